//go:build cgo

package hsm

import (
	"bytes"
	"crypto/rsa"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

var _ rotation.Rewrapper = (*Wrapper)(nil)

func TestGenerateKey(t *testing.T) {
	for _, b := range []*backend{softHSM(t), nss(t)} {
		w := newWrapper(t, b.config(t, 0, "kek"))
		k := must[Key](t)(w.GenerateKey(t.Context()))
		if k.Label != "kek" || len(k.ID) != 16 || k.TokenLabel != b.tokens[0] || k.Mechanism != keyslot.MechGCM || k.Extractable {
			t.Errorf("%s: %+v", b.name, k)
		}
		_, err := w.GenerateKey(t.Context())
		checkFault(t, err, seal.CauseUnavailable, "already has a key with label \"kek\"")
		inSession(t, w, func(s *session) {
			h := must[*key](t)(s.findKey(&w.target.key, "")).handle
			for attr, want := range map[uint]byte{pkcs11.CKA_SENSITIVE: 1, pkcs11.CKA_EXTRACTABLE: 0, pkcs11.CKA_PRIVATE: 1, pkcs11.CKA_TOKEN: 1,
				pkcs11.CKA_WRAP: 0, pkcs11.CKA_UNWRAP: 0, pkcs11.CKA_ENCRYPT: 1, pkcs11.CKA_DECRYPT: 1} {
				if got := s.read(h, attr); !bytes.Equal(got, []byte{want}) {
					t.Errorf("%s: attribute %#x is %v", b.name, attr, got)
				}
			}
			if v := s.read(h, pkcs11.CKA_VALUE); v != nil {
				t.Errorf("%s: the key can be read", b.name)
			}
		})
		withID := b.config(t, 0, "by id")
		withID.URI += ";id=%0a"
		if k := must[Key](t)(newWrapper(t, withID).GenerateKey(t.Context())); !bytes.Equal(k.ID, []byte{10}) {
			t.Errorf("%s: id %x", b.name, k.ID)
		}
		noLabel := w.config
		noLabel.URI = "pkcs11:token=" + b.tokens[0] + ";id=%01"
		if _, err := newWrapper(t, noLabel).GenerateKey(t.Context()); err == nil || !strings.Contains(err.Error(), "it needs a label") {
			t.Error(err)
		}
	}
}

// TestWrapLike: a wrapper wraps only like keyslots of its own key. It compares the names
// of the keys, or opens the keyslot if that names another token.
func TestWrapLike(t *testing.T) {
	b := softHSM(t)
	var w [3]*Wrapper
	for i, key := range []string{"kek;id=%01", "kek;id=%01", "other;id=%02"} {
		c := b.config(t, i%2, "")
		c.URI = fmt.Sprintf("pkcs11:token=%s;object=%s", b.tokens[i%2], key)
		w[i] = newWrapper(t, c)
		must[Key](t)(w[i].GenerateKey(t.Context()))
	}
	first, kek := newKEK(t), newKEK(t)
	like := must[seal.Slot](t)(w[0].Wrap(t.Context(), first))
	opens(t, w[0], must[seal.Slot](t)(w[0].WrapLike(t.Context(), kek, like)), kek)
	for _, not := range w[1:] {
		if _, err := not.WrapLike(t.Context(), kek, like); !errors.Is(err, seal.ErrNotMine) {
			t.Errorf("%v, want ErrNotMine", err)
		}
		if _, err := not.Unwrap(t.Context(), like); !errors.Is(err, seal.ErrNotMine) {
			t.Errorf("%v, want ErrNotMine", err)
		}
	}
	// The same key on a token with another name
	moved := must[*keyslot.Data](t)(keyslot.Parse(like))
	moved.Token.Label, moved.Token.Serial = "was", "elsewhere"
	opens(t, w[0], must[seal.Slot](t)(moved.Slot()), first)
	opens(t, w[0], must[seal.Slot](t)(w[0].WrapLike(t.Context(), kek, must[seal.Slot](t)(moved.Slot()))), kek)
}

// TestPublicKey: with a configured public key, wrapping does not use the token.
func TestPublicKey(t *testing.T) {
	b := nss(t)
	w := b.keyFor(t, 0, "rsa", keyslot.MechOAEP)
	var public *rsa.PublicKey
	inSession(t, w, func(s *session) { public = must[*key](t)(s.findKey(&w.target.key, "")).public })
	c := w.config
	c.PublicKey, c.Module = public, "/nowhere/module.so"
	away := newWrapper(t, c)
	kek := newKEK(t)
	slot := must[seal.Slot](t)(away.Wrap(t.Context(), kek))
	opens(t, w, slot, kek)
	opens(t, w, must[seal.Slot](t)(away.WrapLike(t.Context(), kek, slot)), kek)
	other := nss(t).keyFor(t, 0, "rsa", keyslot.MechOAEP)
	if _, err := away.WrapLike(t.Context(), kek, must[seal.Slot](t)(other.Wrap(t.Context(), kek))); !errors.Is(err, seal.ErrNotMine) {
		t.Errorf("%v, want ErrNotMine", err)
	}
	c.PublicKey = &rsa.PublicKey{N: public.N, E: 2}
	if _, err := New(c); err == nil {
		t.Error("an RSA key with an even exponent is taken")
	}
}

// TestLegacy: a wrapper finds the token and the key of kleidi 1.x.
func TestLegacy(t *testing.T) {
	b := softHSM(t)
	// The init container ran pkcs11-tool --keygen --key-type aes:32 --label kleidi-kms-plugin
	inSession(t, newWrapper(t, b.config(t, 0, "none yet")), func(s *session) {
		must[pkcs11.ObjectHandle](t)(s.GenerateKey(s.Handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
			attribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), attribute(pkcs11.CKA_VALUE_LEN, keySize),
			attribute(pkcs11.CKA_TOKEN, true), attribute(pkcs11.CKA_PRIVATE, true), attribute(pkcs11.CKA_LABEL, LegacyKeyLabel),
			attribute(pkcs11.CKA_ENCRYPT, true), attribute(pkcs11.CKA_DECRYPT, true), attribute(pkcs11.CKA_EXTRACTABLE, true)}))
	})
	c, pin, err := ParseLegacy(seal.Memory{}, fmt.Appendf(nil, `{"path": %q, "tokenLabel": %q, "pin": %q}`, b.module, b.tokens[0], testPIN))
	ok(t, err)
	defer pin.Close()
	c.PINFile = filepath.Join(t.TempDir(), "pin")
	pin.With(func(p []byte) { ok(t, os.WriteFile(c.PINFile, p, 0o600)) })
	w := newWrapper(t, c)
	kek := newKEK(t)
	opens(t, w, must[seal.Slot](t)(w.Wrap(t.Context(), kek)), kek)
	if k := must[Key](t)(w.Find(t.Context())); !k.Extractable || k.Label != LegacyKeyLabel || len(k.ID) != 0 {
		t.Errorf("%+v", k)
	}
}
