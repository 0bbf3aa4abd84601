//go:build cgo

package hsm

import (
	"crypto/rsa"
	"math/big"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/seal"
)

// TestMatches: every attribute that the configuration names must match.
func TestMatches(t *testing.T) {
	two := uint(2)
	info := pkcs11.TokenInfo{Label: "kleidi  ", SerialNumber: "01\x00", ManufacturerID: "maker", Model: "model"}
	for name, row := range map[string]struct {
		token tokenMatch
		want  bool
	}{
		"nothing named":      {tokenMatch{}, true},
		"everything":         {tokenMatch{label: "kleidi", serial: "01", manufacturer: "maker", model: "model", slotID: &two}, true},
		"other label":        {tokenMatch{label: "kleid"}, false},
		"other serial":       {tokenMatch{serial: "02"}, false},
		"other manufacturer": {tokenMatch{manufacturer: "forger"}, false},
		"other model":        {tokenMatch{model: "model 2"}, false},
		"other slot":         {tokenMatch{slotID: new(uint)}, false},
	} {
		if got := row.token.matches(two, info); got != row.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestSessionObject: a key that ends with its session is not the configured key.
func TestSessionObject(t *testing.T) {
	b := softHSM(t)
	inSession(t, newWrapper(t, b.config(t, 0, "kek")), func(s *session) {
		must[pkcs11.ObjectHandle](t)(s.GenerateKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
			attribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), attribute(pkcs11.CKA_VALUE_LEN, keySize),
			attribute(pkcs11.CKA_TOKEN, false), attribute(pkcs11.CKA_LABEL, "kek")}))
		_, err := s.findKey(&keyMatch{label: "kek"}, classSecret)
		checkFault(t, err, seal.CauseKeyMissing, ErrNoKey.Error())
	})
}

// TestPublicDigest: the limits of RSA keys.
func TestPublicDigest(t *testing.T) {
	for _, row := range []struct {
		bits uint
		e    int
		ok   bool
	}{
		{minRSA - 1, 65537, false}, {minRSA, 65537, true}, {maxRSA, 65537, true}, {maxRSA + 1, 65537, false},
		{minRSA, 1, false}, {minRSA, 2, false}, {minRSA, 3, true}, {minRSA, 65536, false},
	} {
		n := new(big.Int).SetBit(big.NewInt(1), int(row.bits)-1, 1)
		if _, err := publicDigest(&rsa.PublicKey{N: n, E: row.e}); (err == nil) != row.ok {
			t.Errorf("%d bits, exponent %d: %v", row.bits, row.e, err)
		}
	}
}

// TestMadeBy: a keyslot of another class or of another key is not this key's, though
// the rest of its names are the same. It counts only if it opens.
func TestMadeBy(t *testing.T) {
	b := softHSM(t)
	w := b.generated(t, 0, "kek")
	inSession(t, w, func(s *session) {
		k := must[*key](t)(s.findKey(&w.target.key, ""))
		like := slotData{Form: form1, Mechanism: mechGCM, Token: nameOf(s.token), Key: k.name}
		ok(t, s.checkMadeBy(k, &like, w)) // by the names alone: it has no ciphertext to open
		class := like
		class.Mechanism = mechOAEP
		name := like
		name.Key.Label, name.Key.ID = "other", hexID{1}
		for what, not := range map[string]*slotData{"class": &class, "name": &name} {
			if err := s.checkMadeBy(k, not, w); err == nil {
				t.Errorf("a keyslot of another %s is taken for this key's", what)
			}
		}
	})
}
