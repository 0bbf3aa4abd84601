//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/cryptoki"
	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

const haveCgo = true

// module is a PKCS#11 module of this process.
type module = cryptoki.Module

func moduleAt(path string) *module { return cryptoki.At(path) }

// errTimeout is the cause of a context that ended because of Config.Timeout.
func errTimeout(d time.Duration) error {
	return fmt.Errorf("%w: no answer within %s", context.DeadlineExceeded, d)
}

// operation is an operation in a session.
type operation[T any] struct {
	flags   uint // of C_OpenSession, beside CKF_SERIAL_SESSION
	run     func(*session) (T, error)
	discard func(T) // see cryptoki.Call
	cleanup func()  // see cryptoki.Call
}

// do runs an operation in a session of its own.
func (o operation[T]) do(ctx context.Context, w *Wrapper) (T, error) {
	var p *seal.Secret
	c := cryptoki.Call[T]{Discard: o.discard, Cleanup: func() {
		closePIN(p)
		if o.cleanup != nil {
			o.cleanup()
		}
	}}
	var none T
	if err := ctx.Err(); err != nil {
		c.End()
		return none, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, w.target.timeout, errTimeout(w.target.timeout))
	defer cancel()
	if w.target.pin != nil {
		var err error
		if p, err = w.target.pin(ctx); err != nil {
			c.End()
			return none, err
		}
	}
	m := w.moduleAt(w.target.module)
	c.Run = func() (T, error) {
		return cryptoki.WithSession(m, cryptoki.Login{Token: w.target.token, Flags: o.flags, PIN: p, Memory: w.config.Memory},
			func(s *cryptoki.Session) (T, error) { return o.run(&session{s}) })
	}
	return cryptoki.Do(ctx, m, w.target.initArgs, c)
}

// seal wraps kek and closes it. If like is not nil, seal fails unless the same key made
// that slot.
func (w *Wrapper) seal(ctx context.Context, kek *seal.Secret, like *keyslot.Data) (*keyslot.Data, error) {
	closeKEK := func() { _ = kek.Close() }
	if w.config.PublicKey != nil {
		defer closeKEK()
		return w.sealPublic(ctx, kek, like)
	}
	return operation[*keyslot.Data]{cleanup: closeKEK, run: func(s *session) (*keyslot.Data, error) {
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
func (w *Wrapper) sealPublic(ctx context.Context, kek *seal.Secret, like *keyslot.Data) (*keyslot.Data, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	k := &key{class: keyslot.ClassPrivate, name: keyslot.KeyName{Label: w.target.key.label, ID: w.target.key.id}}
	if err := k.setPublic(w.config.PublicKey); err != nil {
		return nil, err
	}
	if like != nil && !like.Key.Same(k.name) {
		return nil, seal.ErrNotMine
	}
	d := &keyslot.Data{Form: keyslot.Form1, Mechanism: keyslot.MechOAEP, Token: keyslot.TokenName{Label: w.target.token.Label, Serial: w.target.token.Serial}, Key: k.name}
	var err error
	kek.With(func(b []byte) { err = sealOAEP(nil, k, nil, b, d) })
	return d, err
}

func (s *session) seal(k *key, kek *seal.Secret, w *Wrapper, only []string) (*keyslot.Data, error) {
	m, err := s.choose(k, only)
	if err != nil {
		return nil, err
	}
	d := &keyslot.Data{Form: keyslot.Form1, Mechanism: m.name, Token: s.Name(), Key: k.name}
	return d, cryptoki.WithCopy(w.config.Memory, kek, func(b []byte) error { return m.seal(s, k, m, b, d) })
}

// checkMadeBy checks that k made the slot like. It compares their names. If the slot
// names another token, it opens the slot, because a token may be a copy of another one.
func (s *session) checkMadeBy(k *key, like *keyslot.Data, w *Wrapper) error {
	if mechanismNamed(like.Mechanism).class == k.class && like.Key.Same(k.name) && (k.class == keyslot.ClassPrivate || like.Token == s.Name()) {
		return nil
	}
	kek, err := s.open(like, w)
	if err == nil {
		_ = kek.Close()
	}
	return err
}

func (w *Wrapper) open(ctx context.Context, d *keyslot.Data) (*seal.Secret, error) {
	return operation[*seal.Secret]{
		run:     func(s *session) (*seal.Secret, error) { return s.open(d, w) },
		discard: func(kek *seal.Secret) { _ = kek.Close() },
	}.do(ctx, w)
}

// open opens a slot. Tokens have many answers to a ciphertext that does not authenticate.
// So if a slot does not open, open wraps and opens a fresh KEK, which shows whether the
// token or the slot is to blame.
func (s *session) open(d *keyslot.Data, w *Wrapper) (*seal.Secret, error) {
	m := mechanismNamed(d.Mechanism)
	k, err := s.findKey(&w.target.key, m.class)
	if err != nil {
		return nil, err
	}
	if !d.Key.Same(k.name) {
		return nil, seal.ErrNotMine
	}
	b, err := m.open(s, k, m, d)
	defer clear(b[:cap(b)])
	switch {
	case err == nil && len(b) == seal.KEKSize:
		return w.config.Memory.Take(b)
	case err == nil:
		return nil, keyslot.Corrupt("it holds %d bytes, want %d", len(b), seal.KEKSize)
	case cryptoki.IsLost(err):
		return nil, err
	case s.probe(k, m, w) != nil:
		return nil, fmt.Errorf("the key does not work: %w", err)
	case m.class == keyslot.ClassSecret && d.Token != s.Name():
		return nil, seal.ErrNotMine
	}
	return nil, keyslot.OtherKey("it does not open, but a KEK that the same key has just wrapped does: %w", err)
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

// readPIN needs neither the PIN nor a session.
func (w *Wrapper) readPIN(ctx context.Context) (PIN, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, w.target.timeout, errTimeout(w.target.timeout))
	defer cancel()
	m := w.moduleAt(w.target.module)
	return cryptoki.Do(ctx, m, w.target.initArgs, cryptoki.Call[PIN]{Run: func() (PIN, error) {
		t, err := cryptoki.ReadToken(m, &w.target.token)
		return PIN{Module: w.target.module, TokenLabel: keyslot.Trim(t.Label), Locked: t.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0,
			FinalTry: t.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0, CountLow: t.Flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0}, err
	}})
}

func (s *session) describe(k *key, only []string) (Key, error) {
	m, err := s.choose(k, only)
	if err != nil {
		return Key{}, err
	}
	t := s.Name()
	return Key{TokenLabel: t.Label, TokenSerial: t.Serial, Label: k.name.Label, ID: k.name.ID, Mechanism: m.name,
		Extractable: !bytes.Equal(s.read(k.handle, pkcs11.CKA_EXTRACTABLE), []byte{0})}, nil
}

// closePIN closes p unless it is nil.
func closePIN(p *seal.Secret) {
	if p != nil {
		_ = p.Close()
	}
}
