//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/seal"
)

const haveCgo = true

// operation is an operation in a session.
type operation[T any] struct {
	flags   uint // of C_OpenSession, beside CKF_SERIAL_SESSION
	run     func(*session) (T, error)
	discard func(T) // see call
	cleanup func()  // see call
}

// do runs an operation in a session of its own.
func (o operation[T]) do(ctx context.Context, w *Wrapper) (T, error) {
	var p *seal.Secret
	c := call[T]{discard: o.discard, cleanup: func() {
		closePIN(p)
		if o.cleanup != nil {
			o.cleanup()
		}
	}}
	var none T
	if err := ctx.Err(); err != nil {
		c.end()
		return none, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, w.target.timeout, errTimeout(w.target.timeout))
	defer cancel()
	if w.target.pin != nil {
		var err error
		if p, err = w.target.pin(ctx); err != nil {
			c.end()
			return none, err
		}
	}
	m := w.moduleAt(w.target.module)
	c.run = func() (T, error) { return withSession(m, w, p, o.flags, o.run) }
	return do(ctx, m, w.target.initArgs, c)
}

// withSession finds the token, opens a session, logs in and calls f. Then it logs out and
// closes the session.
func withSession[T any](m *module, w *Wrapper, p *seal.Secret, flags uint, f func(*session) (T, error)) (result T, err error) {
	s := &session{cryptoki: m.p}
	if s.slot, s.token, err = findToken(m.p, &w.target.token); err != nil {
		return result, err
	}
	if s.h, err = s.OpenSession(s.slot, pkcs11.CKF_SERIAL_SESSION|flags); err != nil {
		return result, fmt.Errorf("C_OpenSession: %w", err)
	}
	defer func() { _ = s.CloseSession(s.h) }() // it fails for a lost session, which is closed
	logout, err := s.login(&m.pins, p, w.config.Memory)
	if err != nil {
		return result, err
	}
	defer logout()
	return f(s)
}

// seal wraps kek and closes it. If like is not nil, seal fails unless the same key made
// that slot.
func (w *Wrapper) seal(ctx context.Context, kek *seal.Secret, like *slotData) (*slotData, error) {
	closeKEK := func() { _ = kek.Close() }
	if w.config.PublicKey != nil {
		defer closeKEK()
		return w.sealPublic(ctx, kek, like)
	}
	return operation[*slotData]{cleanup: closeKEK, run: func(s *session) (*slotData, error) {
		k, err := s.findKey(&w.target.key, "")
		if err != nil {
			return nil, err
		}
		if like != nil {
			if err := s.checkMadeBy(k, like, w); err != nil {
				return nil, err
			}
		}
		return s.seal(k, kek, w, w.only)
	}}.do(ctx, w)
}

// sealPublic wraps with an RSA key whose public part is configured. It does not use the
// token.
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
	return d, withCopy(w.config.Memory, kek, func(b []byte) error { return m.seal(s, k, m, b, d) })
}

// checkMadeBy checks that k made the slot like. It compares their names. If the slot
// names another token, it opens the slot, because a token may be a copy of another one.
func (s *session) checkMadeBy(k *key, like *slotData, w *Wrapper) error {
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
	return operation[*seal.Secret]{
		run:     func(s *session) (*seal.Secret, error) { return s.open(d, w) },
		discard: func(kek *seal.Secret) { _ = kek.Close() },
	}.do(ctx, w)
}

// open opens a slot. Tokens have many answers to a ciphertext that does not authenticate.
// So if a slot does not open, open wraps and opens a fresh KEK, which shows whether the
// token or the slot is to blame.
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
	return nil, otherKey("it does not open, but a KEK that the same key has just wrapped does: %w", err)
}

// probe checks that the key works: it wraps a random KEK and opens it.
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

func (w *Wrapper) generate(ctx context.Context) (Key, error) {
	return operation[Key]{flags: pkcs11.CKF_RW_SESSION, run: func(s *session) (Key, error) {
		k, err := s.generateKey(&w.target.key)
		if err != nil {
			return Key{}, err
		}
		return s.describe(k, w.only)
	}}.do(ctx, w)
}

func (w *Wrapper) findKey(ctx context.Context) (Key, error) {
	return operation[Key]{run: func(s *session) (Key, error) {
		k, err := s.findKey(&w.target.key, "")
		if err != nil {
			return Key{}, err
		}
		return s.describe(k, w.only)
	}}.do(ctx, w)
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
