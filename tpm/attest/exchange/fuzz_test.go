package exchange

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"math/big"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/tpm/keys"
)

// FuzzKeys: the two keys of a Hello come from anybody. No byte of them ends the
// process. A credential can be made for every accepted endorsement key, and every
// accepted attestation key has the template, so that its Name covers it completely.
func FuzzKeys(f *testing.F) {
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		f.Fatal(err)
	}
	e, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	ak := someAK()
	if !keys.IsAK(&ak) {
		f.Fatal("the seed is no attestation key")
	}
	even := &rsa.PublicKey{N: new(big.Int).Sub(r.N, big.NewInt(1)), E: r.E}
	for _, key := range []any{&r.PublicKey, even, &e.PublicKey} {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(der, tpm2.Marshal(ak))
	}
	f.Fuzz(func(t *testing.T, spki, public []byte) {
		if key, err := encapsulationKey(spki); err == nil {
			if _, _, err := makeCredential(key, make([]byte, NameSize), make([]byte, secretSize)); err != nil {
				t.Errorf("no credential can be made for it: %v", err)
			}
		}
		name, err := checkAK(public)
		if err != nil {
			return
		}
		p, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
		if err != nil || !bytes.Equal(tpm2.Marshal(p), public) || !keys.IsAK(p) || len(name) != NameSize {
			t.Errorf("it is taken for an attestation key: %v", err)
		}
	})
}
