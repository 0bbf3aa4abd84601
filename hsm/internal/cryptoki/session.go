//go:build cgo

package cryptoki

import (
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

// Session is an open session with a token.
type Session struct {
	Functions
	Handle pkcs11.SessionHandle
	Slot   uint // PKCS#11's slot, in which the token is
	Token  pkcs11.TokenInfo
}

// Login says how to open a session and log in.
type Login struct {
	Token TokenMatch
	Flags uint         // of C_OpenSession, beside CKF_SERIAL_SESSION
	PIN   *seal.Secret // nil if none is configured
	// Memory allocates the memory of copies of the PIN.
	Memory seal.Memory
}

// WithSession finds the token, opens a session, logs in and calls f. Then it logs out and
// closes the session. Call it in a [Call] on m.
func WithSession[T any](m *Module, l Login, f func(*Session) (T, error)) (result T, err error) {
	s := &Session{Functions: m.Functions}
	if s.Slot, s.Token, err = findToken(m.Functions, &l.Token); err != nil {
		return result, err
	}
	if s.Handle, err = s.OpenSession(s.Slot, pkcs11.CKF_SERIAL_SESSION|l.Flags); err != nil {
		return result, fmt.Errorf("C_OpenSession: %w", err)
	}
	defer func() { _ = s.CloseSession(s.Handle) }() // it fails for a lost session, which is closed
	logout, err := s.login(&m.pins, l.PIN, l.Memory)
	if err != nil {
		return result, err
	}
	defer logout()
	return f(s)
}

// Name returns the name of the session's token.
func (s *Session) Name() keyslot.TokenName { return nameOf(s.Token) }
