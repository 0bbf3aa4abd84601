//go:build cgo

package cryptoki

import (
	"errors"
	"fmt"
	"slices"
	"unsafe"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/pinfile"
	"github.com/beezy-dev/kleidi/seal"
)

// PINUnseen are the answers if the session ended, or the token was taken out, before
// the token saw the PIN.
var PINUnseen = []pkcs11.Error{
	pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_TOKEN_NOT_PRESENT,
	pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_SLOT_ID_INVALID,
}

const (
	hintPIN = "put the right PIN into the file that pkcs11.pinFile names, or seal it for pkcs11.sealedPINFile with kleidi pkcs11-pin --pin-file FILE --out FILE; " +
		"kleidi tries another PIN once, and this one again only after a restart"
	hintUnknown = "check whether the token works, then restart kleidi, which gives the PIN once more; kleidi gives another PIN without a restart"
	hintLocked  = "have the security officer unlock the user PIN (C_InitPIN); afterwards kleidi goes on by itself"
)

// login logs in if the token demands it, and returns a function that logs out. It does
// not use a PIN again that the token refused, or that pinRecord.mayRepeat excludes.
func (s *Session) login(t *pinRecord, p *seal.Secret, mem seal.Memory) (logout func(), err error) {
	if s.Token.Flags&pkcs11.CKF_LOGIN_REQUIRED == 0 {
		return func() {}, nil
	}
	if err := s.mayLogin(p); err != nil {
		return nil, err
	}
	mark, err := t.mark(mem, p)
	if err != nil {
		return nil, err
	}
	name := s.Name()
	if answer, ok := t.answers[name][mark]; ok && !t.mayRepeat(name, mark, answer, s.Token.Flags) {
		return nil, s.refuseAgain(answer, s.Token.Flags)
	}
	if s.Token.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0 {
		return nil, s.refuse("log in by hand with the right PIN, which resets the count: pkcs11-tool --login --list-objects",
			"it reports that one more wrong PIN locks it, so kleidi leaves that try to you")
	}
	err = WithCopy(mem, p, func(b []byte) error { return s.Login(s.Handle, pkcs11.CKU_USER, unsafe.String(&b[0], len(b))) })
	answer, answered := errors.AsType[pkcs11.Error](err)
	switch {
	case err == nil:
		t.succeeded(name, mark)
		return func() { _ = s.Logout(s.Handle) }, nil
	case answer == pkcs11.CKR_USER_ALREADY_LOGGED_IN: // another user of the module has logged in, and logs out
		return func() {}, nil
	case answer == pkcs11.CKR_PIN_LOCKED:
		return nil, s.refuse(hintLocked, "C_Login: %w", err)
	case !answered || slices.Contains(PINUnseen, answer):
		return nil, fmt.Errorf("C_Login: %w", err)
	}
	t.failed(name, mark, answer)
	now, infoErr := s.GetTokenInfo(s.Slot)
	switch {
	case slices.Contains(refusals, answer):
		return nil, s.refuse(hintPIN, "C_Login: %w%s", err, tries(now.Flags))
	case infoErr == nil && t.mayRepeat(name, mark, answer, now.Flags): // %v, not %w: see refuseAgain
		return nil, seal.Errorf(seal.CauseUnavailable, "check whether the token works; kleidi tries again by itself", "token %v: it answered %v to C_Login", name, answer)
	}
	return nil, s.refuseAgain(answer, now.Flags)
}

// mayLogin checks that a login is possible at all.
func (s *Session) mayLogin(p *seal.Secret) error {
	var size int
	if p != nil {
		p.With(func(b []byte) { size = len(b) })
	}
	switch {
	case s.Token.Flags&pkcs11.CKF_USER_PIN_INITIALIZED == 0:
		return s.refuse("set one, for instance with pkcs11-tool --init-pin", "it has no user PIN yet")
	case s.Token.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return s.refuse(hintLocked, "it reports that its user PIN is locked")
	case size > pinfile.MaxPIN:
		return s.refuse("set a shorter one", "the PIN has %d bytes, at most %d are allowed", size, pinfile.MaxPIN)
	case size == 0:
		return s.refuse("set pkcs11.pinFile or pkcs11.sealedPINFile", "it demands a PIN, and none is configured")
	}
	return nil
}

func (s *Session) refuse(hint, format string, args ...any) error {
	return seal.Errorf(seal.CauseCredentials, hint, "token %v: %w", s.Name(), fmt.Errorf(format, args...))
}

// refuseAgain is the error for a PIN that is not given to the token again. The token may
// have counted an answer as a wrong PIN even if that answer is no refusal. Such an
// answer is formatted with %v, not %w, so that IsLost does not take it for a lost
// session and repeat the login.
func (s *Session) refuseAgain(answer pkcs11.Error, flags uint) error {
	if slices.Contains(refusals, answer) {
		return s.refuse(hintPIN, "it refused this PIN before, so kleidi does not give it again%s", tries(flags))
	}
	return seal.Errorf(seal.CauseUnavailable, hintUnknown, "token %v: it answered %v to C_Login and may have counted that as a wrong PIN, so kleidi does not give this PIN again%s",
		s.Name(), answer, tries(flags))
}

// tries describes what the token's flags say about the remaining tries.
func tries(flags uint) string {
	switch {
	case flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return "; the token reports that the PIN is now locked"
	case flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return "; the token reports that one try is left"
	case flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0:
		return "; the token reports that a wrong PIN was entered since the last right one"
	}
	return ""
}
