//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/seal"
)

const haveCgo = true

// lost are the codes of a session, token or key that went away during the operation.
var lost = []pkcs11.Error{
	pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_TOKEN_NOT_PRESENT,
	pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_SLOT_ID_INVALID, pkcs11.CKR_DEVICE_ERROR,
	pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_OPERATION_NOT_INITIALIZED, pkcs11.CKR_OPERATION_ACTIVE,
}

func isLost(err error) bool {
	code, ok := errors.AsType[pkcs11.Error](err)
	return ok && slices.Contains(lost, code)
}

// run runs f in a session. end is called once, when f no longer runs.
func run[T any](ctx context.Context, w *Wrapper, flags uint, f func(*session) (T, error), drop func(T), end func()) (T, error) {
	var none T
	if err := ctx.Err(); err != nil {
		end()
		return none, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, w.target.timeout, errTimeout(w.target.timeout))
	defer cancel()
	var p *seal.Secret
	if w.target.pin != nil {
		var err error
		if p, err = w.target.pin(ctx); err != nil {
			end()
			return none, err
		}
	}
	m := w.find(w.target.module)
	return do(ctx, m, w.target.initArgs, func() (T, error) { return withSession(m, w, p, flags, f) }, drop, func() { closePIN(p); end() })
}

// seal wraps kek, which it closes.
func (w *Wrapper) seal(ctx context.Context, kek *seal.Secret, like *slotData) (*slotData, error) {
	end := func() { _ = kek.Close() }
	if w.config.PublicKey != nil {
		defer end()
		return w.sealPublic(ctx, kek, like)
	}
	return run(ctx, w, 0, func(s *session) (*slotData, error) {
		k, err := s.findKey(&w.target.key, "")
		if err != nil {
			return nil, err
		}
		if like != nil {
			if err := s.owns(k, like, w); err != nil {
				return nil, err
			}
		}
		return s.seal(k, kek, w, w.only)
	}, func(*slotData) {}, end)
}

// sealPublic wraps for an RSA key whose public part is configured: without the token.
func (w *Wrapper) sealPublic(ctx context.Context, kek *seal.Secret, like *slotData) (*slotData, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	k := &key{class: classPrivate, name: keyName{Label: w.target.key.label, ID: w.target.key.id}}
	if err := k.setPublic(w.config.PublicKey); err != nil {
		return nil, err
	}
	if like != nil && !like.Key.same(k.name) {
		return nil, seal.ErrNotMine
	}
	d := &slotData{Form: form1, Mechanism: mechOAEP, Token: tokenName{w.target.token.label, w.target.token.serial}, Key: k.name}
	var err error
	kek.With(func(b []byte) { err = sealOAEP(nil, k, nil, b, d) })
	return d, err
}

func (s *session) seal(k *key, kek *seal.Secret, w *Wrapper, only []string) (*slotData, error) {
	m, err := s.choose(k, only)
	if err != nil {
		return nil, err
	}
	d := &slotData{Form: form1, Mechanism: m.name, Token: nameOf(s.token), Key: k.name}
	return d, lend(w.config.Memory, kek, func(b []byte) error { return m.seal(s, k, m, b, d) })
}

// owns says whether k made the slot like: by names, and if the token's differs by
// opening it, since a token may be another one's copy.
func (s *session) owns(k *key, like *slotData, w *Wrapper) error {
	if mechanismNamed(like.Mechanism).class == k.class && like.Key.same(k.name) && (k.class == classPrivate || like.Token == nameOf(s.token)) {
		return nil
	}
	kek, err := s.open(like, w)
	if err == nil {
		_ = kek.Close()
	}
	return err
}

func (w *Wrapper) open(ctx context.Context, d *slotData) (*seal.Secret, error) {
	return run(ctx, w, 0, func(s *session) (*seal.Secret, error) { return s.open(d, w) }, func(kek *seal.Secret) { _ = kek.Close() }, func() {})
}

// open opens a slot. Tokens say all manner of things of a ciphertext that does not
// authenticate; so when one fails, the key shows with a fresh one whether it is
// the token or the slot.
func (s *session) open(d *slotData, w *Wrapper) (*seal.Secret, error) {
	m := mechanismNamed(d.Mechanism)
	k, err := s.findKey(&w.target.key, m.class)
	if err != nil {
		return nil, err
	}
	if !d.Key.same(k.name) {
		return nil, seal.ErrNotMine
	}
	b, err := m.open(s, k, m, d)
	defer clear(b[:cap(b)])
	switch {
	case err == nil && len(b) == seal.KEKSize:
		return w.config.Memory.Take(b)
	case err == nil:
		return nil, corrupt("it holds %d bytes, want %d", len(b), seal.KEKSize)
	case isLost(err):
		return nil, err
	case s.probe(k, m, w) != nil:
		return nil, fmt.Errorf("the key does not work: %w", err)
	case m.class == classSecret && d.Token != nameOf(s.token):
		return nil, seal.ErrNotMine
	}
	return nil, otherKey("it does not open, and what the same key has just wrapped does: %w", err)
}

// probe wraps a random KEK and opens it.
func (s *session) probe(k *key, m *mechanism, w *Wrapper) error {
	kek, err := w.config.Memory.NewKEK()
	if err != nil {
		return err
	}
	defer kek.Close()
	d, err := s.seal(k, kek, w, []string{m.name})
	if err != nil {
		return err
	}
	b, err := m.open(s, k, m, d)
	clear(b[:cap(b)])
	return err
}

// same reports whether both name one key. A label can be changed, so the IDs
// decide where both have one.
func (k keyName) same(o keyName) bool {
	if string(k.Public) != string(o.Public) {
		return false
	}
	if len(k.ID) > 0 && len(o.ID) > 0 {
		return string(k.ID) == string(o.ID)
	}
	return k.Label == o.Label
}

func (w *Wrapper) generate(ctx context.Context) (Key, error) {
	return run(ctx, w, pkcs11.CKF_RW_SESSION, func(s *session) (Key, error) {
		k, err := s.generateKey(&w.target.key)
		if err != nil {
			return Key{}, err
		}
		return s.describe(k, w.only)
	}, func(Key) {}, func() {})
}

func (w *Wrapper) look(ctx context.Context) (Key, error) {
	return run(ctx, w, 0, func(s *session) (Key, error) {
		k, err := s.findKey(&w.target.key, "")
		if err != nil {
			return Key{}, err
		}
		return s.describe(k, w.only)
	}, func(Key) {}, func() {})
}

func (s *session) describe(k *key, only []string) (Key, error) {
	m, err := s.choose(k, only)
	if err != nil {
		return Key{}, err
	}
	t := nameOf(s.token)
	return Key{TokenLabel: t.Label, TokenSerial: t.Serial, Label: k.name.Label, ID: k.name.ID, Mechanism: m.name,
		Extractable: !bytes.Equal(s.read(k.handle, pkcs11.CKA_EXTRACTABLE), []byte{0})}, nil
}
