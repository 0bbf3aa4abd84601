//go:build cgo

package hsm

import (
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

// TestSessionObject: a key that ends with its session is not the configured key.
func TestSessionObject(t *testing.T) {
	b := softHSM(t)
	inSession(t, newWrapper(t, b.config(t, 0, "kek")), func(s *session) {
		must[pkcs11.ObjectHandle](t)(s.GenerateKey(s.Handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
			attribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), attribute(pkcs11.CKA_VALUE_LEN, keySize),
			attribute(pkcs11.CKA_TOKEN, false), attribute(pkcs11.CKA_LABEL, "kek")}))
		_, err := s.findKey(&keyMatch{label: "kek"}, keyslot.ClassSecret)
		checkFault(t, err, seal.CauseKeyMissing, ErrNoKey.Error())
	})
}

// TestMadeBy: a keyslot of another class or of another key is not this key's, even if
// its other names are the same. It counts only if it opens.
func TestMadeBy(t *testing.T) {
	b := softHSM(t)
	w := b.generated(t, 0, "kek")
	inSession(t, w, func(s *session) {
		k := must[*key](t)(s.findKey(&w.target.key, ""))
		like := keyslot.Data{Form: keyslot.Form1, Mechanism: keyslot.MechGCM, Token: s.Name(), Key: k.name}
		ok(t, s.checkMadeBy(k, &like, w)) // by the names alone: it has no ciphertext to open
		class := like
		class.Mechanism = keyslot.MechOAEP
		name := like
		name.Key.Label, name.Key.ID = "other", keyslot.HexID{1}
		for what, not := range map[string]*keyslot.Data{"class": &class, "name": &name} {
			if err := s.checkMadeBy(k, not, w); err == nil {
				t.Errorf("a keyslot of another %s is taken for this key's", what)
			}
		}
	})
}
