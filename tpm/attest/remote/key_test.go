package remote

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// TestKey: a key is of a kind that a TPM verifies, and is never printed.
func TestKey(t *testing.T) {
	for name, k := range map[string]*Key{"ECDSA": ecdsaKey(t), "RSA": rsaKey(t, 2048)} {
		if s := fmt.Sprintf("%v %+v %#v %s", k, k, k, k); s != strings.Repeat("remote.Key ", 3)+"remote.Key" {
			t.Errorf("%s prints as %q", name, s)
		}
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, signer := range map[string]crypto.Signer{"Ed25519": ed, "RSA 1024": small, "P-224": p224} {
		if _, err := NewKey(signer); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestTerm: the verifier is asked in the middle of a session, as during the opening of
// a slot, with keys of every kind, on a TPM with room for three objects and sessions.
func TestTerm(t *testing.T) {
	r := newRig(t, simboot.Baseline(simboot.UKI))
	for name, key := range map[string]*Key{"ECDSA": ecdsaKey(t), "RSA": rsaKey(t, 3072)} {
		r.use(key)
		public, err := authpolicy.PublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		err = r.session(func(tp transport.TPM, srk *keys.SRK, s tpm2.Session) error {
			return authpolicy.Terms{authpolicy.Signed{Key: public, Ref: PolicyRef(cluster, "alpha"), Sign: func(nonceTPM []byte) (tpm2.TPMTSignature, error) {
				return r.attester.Sign(t.Context(), tp, srk, nonceTPM)
			}}}.Satisfy(tp, s)
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestUnseal: a sealed object opens with the signature and not without, in the only
// order for which the TPM has room: the object is loaded last.
func TestUnseal(t *testing.T) {
	r := newRig(t, simboot.Baseline(simboot.UKI))
	public, err := authpolicy.PublicKey(r.verifier.Keys[0].Public())
	if err != nil {
		t.Fatal(err)
	}
	var pcrs authpolicy.PCR
	var created *tpm2.CreateResponse
	err = r.session(func(tp transport.TPM, srk *keys.SRK, _ tpm2.Session) error {
		values, err := keys.ReadPCRs(tp, crypto.SHA256, []int{4, 7, 11})
		if err != nil {
			return err
		}
		pcrs = authpolicy.PCR{Bank: crypto.SHA256, Values: values}
		digest, err := authpolicy.Terms{pcrs, authpolicy.Signed{Key: public, Ref: PolicyRef(cluster, "alpha")}}.Digest()
		if err != nil {
			return err
		}
		created, err = tpm2.Create{ParentHandle: tpm2.AuthHandle{Handle: srk.Handle, Name: srk.Name, Auth: tpm2.PasswordAuth(nil)},
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: []byte("KEK")})}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256, AuthPolicy: tpm2.TPM2BDigest{Buffer: digest},
				ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true, AdminWithPolicy: true}})}.Execute(tp)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	unseal := func(with bool) (kek []byte, err error) {
		err = r.session(func(tp transport.TPM, srk *keys.SRK, s tpm2.Session) error {
			terms := authpolicy.Terms{pcrs}
			if with {
				terms = append(terms, authpolicy.Signed{Key: public, Ref: PolicyRef(cluster, "alpha"), Sign: func(nonceTPM []byte) (tpm2.TPMTSignature, error) {
					return r.attester.Sign(t.Context(), tp, srk, nonceTPM)
				}})
			}
			if err := terms.Satisfy(tp, s); err != nil {
				return err
			}
			object, err := tpm2.Load{ParentHandle: tpm2.AuthHandle{Handle: srk.Handle, Name: srk.Name, Auth: tpm2.PasswordAuth(nil)}, InPrivate: created.OutPrivate, InPublic: created.OutPublic}.Execute(tp)
			if err != nil {
				return err
			}
			u, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: object.ObjectHandle, Name: object.Name, Auth: s}}.Execute(tp)
			if err == nil {
				kek = u.OutData.Buffer
			}
			return err
		})
		return kek, err
	}
	if kek, err := unseal(true); err != nil || string(kek) != "KEK" {
		t.Errorf("with the signature: %q, %v", kek, err)
	}
	if _, err := unseal(false); !errors.Is(err, tpm2.TPMRCPolicyFail) {
		t.Errorf("without the signature: %v", err)
	}
}

// TestSeveralKeys: each slot gets a signature by the key that it demands, so that nodes
// can move from one key to the next while both exist.
func TestSeveralKeys(t *testing.T) {
	r := newRig(t, simboot.Baseline(simboot.UKI))
	current, former := rsaKey(t, 2048), ecdsaKey(t)
	r.verifier.Keys = []*Key{current, former}
	for name, key := range map[string]*Key{"current": current, "former": former} {
		r.attester.Key = key.name
		err := r.session(func(tp transport.TPM, srk *keys.SRK, s tpm2.Session) error {
			signature, err := r.attester.Sign(t.Context(), tp, srk, s.NonceTPM().Buffer)
			if err != nil {
				return err
			}
			return policySigned(tp, key.Public(), s, PolicyRef(cluster, "alpha"), signature)
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	r.verifier.Keys, r.attester.Key = []*Key{current}, former.name
	r.refused("a key that was given up", r.ask(), CheckKey, "another key")
}
