package authpolicy_test

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// goldenNames are the Names of the keys in testdata. They are frozen: slots are
// sealed to them.
var goldenNames = map[string]string{
	"rsa2048.pem": "000b02ac3261f8933ba0264278feab968efb666512a449e39362ddb0626f59dfebf7",
	"rsa3072.pem": "000b0655a92ff52f99177a4d92cd344b12ba8ec9904648326c5ee2df2900d8f4b3c3",
	"rsa4096.pem": "000b55b236b8675edb7a594840251e0ac2d3c8c067ab9c9abc29be9d48e13b425b0d",
	"P256.pem":    "000b8fb2be2e0c4f431112823218a70b4c65af0161fb1e73bfef7c6119b1c67c4fac",
	"P384.pem":    "000b56092cc1732ed84a41d06a677e323ceb7e3382b8d0f48682460034108c3c2127",
}

func goldenKey(t testing.TB, file string) crypto.PublicKey {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// TestName: the Names are the frozen ones, and the TPM's, where it takes the key;
// where it does not, the error says so.
func TestName(t *testing.T) {
	withCounter(t, func(tp transport.TPM, _ *nv.Counter, _ uint64) error {
		for file, want := range goldenNames {
			public, err := authpolicy.PublicKey(goldenKey(t, file))
			if err != nil {
				t.Errorf("%s: %v", file, err)
				continue
			}
			name, err := authpolicy.Name(public)
			if err != nil || hex.EncodeToString(name) != want {
				t.Errorf("%s: %x, %v; want %s", file, name, err, want)
			}
			r, err := tpm2.LoadExternal{InPublic: tpm2.New2B(public), Hierarchy: tpm2.TPMRHOwner}.Execute(tp)
			if file == "rsa4096.pem" && err != nil { // libtpms before 0.10 has none
				_, err := digestOnTPM(tp, authpolicy.Terms{authpolicy.Signed{Key: public, Sign: rsaSigner(t).agree(nil)}})
				wantOnly(t, file, err, authpolicy.ErrKey)
				continue
			}
			if err != nil {
				t.Errorf("%s: %v", file, err)
				continue
			}
			if !bytes.Equal(r.Name.Buffer, name) {
				t.Errorf("%s: %x on the TPM, %x computed here", file, r.Name.Buffer, name)
			}
			if _, err := (tpm2.FlushContext{FlushHandle: r.ObjectHandle}).Execute(tp); err != nil {
				return err
			}
		}
		return nil
	})
}

func TestNameOfAnotherAlgorithm(t *testing.T) {
	public := ecdsaSigner(t, elliptic.P256()).public
	public.NameAlg = tpm2.TPMAlgSHA384
	if _, err := authpolicy.Name(public); err == nil {
		t.Error("accepted")
	}
	for _, term := range []authpolicy.Term{authpolicy.Authorized{Key: public}, authpolicy.Signed{Key: public}, authpolicy.Authorized{}, authpolicy.Signed{}} {
		if _, err := (authpolicy.Terms{term}).Digest(); err == nil {
			t.Errorf("%T accepts it", term)
		}
	}
}

func TestPublicKeyRefuses(t *testing.T) {
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	odd := goldenKey(t, "rsa2048.pem").(*rsa.PublicKey)
	odd.E = 3
	p521 := must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))
	off := goldenKey(t, "P256.pem").(*ecdsa.PublicKey)
	//lint:ignore SA1019 nothing else makes a key that is not on its curve
	off.X = new(big.Int).Add(off.X, big.NewInt(1))
	edPublic, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.PublicKey{
		"nothing": nil, "no RSA modulus": &rsa.PublicKey{E: 65537}, "RSA 1024": small.Public(), "exponent 3": odd, "P-521": p521.Public(),
		"no curve": &ecdsa.PublicKey{}, "not on the curve": off, "Ed25519": edPublic, "ECDH": must(ecdh.P256().GenerateKey(rand.Reader)).Public(),
		"a private key": must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)),
	} {
		if _, err := authpolicy.PublicKey(key); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// FuzzSignature: an accepted signature encodes to the same value.
func FuzzSignature(f *testing.F) {
	p256 := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	p384 := must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	rsaKey := goldenKey(f, "rsa2048.pem").(*rsa.PublicKey)
	hash := sha256.Sum256(nil)
	for _, key := range []*ecdsa.PrivateKey{p256, p384} {
		f.Add(must(key.Sign(rand.Reader, hash[:], crypto.SHA256)))
	}
	f.Add(make([]byte, 256))
	f.Add([]byte{0x30, 6, 2, 1, 0, 2, 1, 1})
	f.Add([]byte{0x30, 6, 2, 1, 1, 2, 1, 0xff})
	f.Add([]byte{0x30, 6, 2, 1, 1, 2, 1, 1})
	f.Add([]byte{0x30, 6, 2, 1, 1, 2, 1, 1, 0})
	f.Fuzz(func(t *testing.T, raw []byte) {
		for _, key := range []*ecdsa.PublicKey{&p256.PublicKey, &p384.PublicKey} {
			s, err := authpolicy.Signature(key, raw)
			if err != nil {
				if ecdsa.VerifyASN1(key, hash[:], raw) {
					t.Error("a signature that verifies is refused")
				}
				continue
			}
			e, err := s.Signature.ECDSA()
			size := (key.Params().BitSize + 7) / 8
			if err != nil || len(e.SignatureR.Buffer) != size || len(e.SignatureS.Buffer) != size {
				t.Fatalf("%v, %v", e, err)
			}
		}
		s, err := authpolicy.Signature(rsaKey, raw)
		if (err == nil) != (len(raw) == 256) {
			t.Errorf("%d bytes: %v", len(raw), err)
		}
		if err == nil {
			if r, err := s.Signature.RSASSA(); err != nil || !bytes.Equal(r.Sig.Buffer, raw) {
				t.Errorf("%v, %v", r, err)
			}
		}
	})
}

// TestSignatureOfAnotherKey: another key's signature is refused, and another failure
// of the TPM is not taken for a bad signature.
func TestSignatureOfAnotherKey(t *testing.T) {
	if _, err := authpolicy.Signature(ed25519.PublicKey{}, nil); err == nil {
		t.Error("a signature by Ed25519 is accepted")
	}
	withCounter(t, func(tp transport.TPM, _ *nv.Counter, _ uint64) error {
		op := ecdsaSigner(t, elliptic.P256())
		state := op.state(presentPCRs(t, tp, crypto.SHA256, 7), nil)
		terms := authpolicy.Terms{authpolicy.Authorized{Key: op.public, States: []authpolicy.SignedState{state, state}}}
		for _, code := range []tpm2.TPMCC{tpm2.TPMCCVerifySignature, tpm2.TPMCCLoadExternal, tpm2.TPMCCPolicyAuthorize, tpm2.TPMCCPolicyRestart, tpm2.TPMCCPolicyGetDigest} {
			_, err := digestOnTPM(failing{tp, code}, terms)
			wantOnly(t, "a failure", err, nil)
			if !errors.Is(err, tpm2.TPMRCFailure) {
				t.Errorf("%v: %v", code, err)
			}
		}
		return nil
	})
}
