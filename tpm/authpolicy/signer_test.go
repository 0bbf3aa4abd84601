package authpolicy_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
)

// signer is an operator or a verifier.
type signer struct {
	testing.TB
	key    crypto.Signer
	public tpm2.TPMTPublic
}

func newSigner(t testing.TB, key crypto.Signer, err error) *signer {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	public, err := authpolicy.PublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return &signer{t, key, public}
}

func ecdsaSigner(t testing.TB, c elliptic.Curve) *signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(c, rand.Reader)
	return newSigner(t, key, err)
}

func rsaSigner(t testing.TB) *signer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	return newSigner(t, key, err)
}

// signers are one of each kind that swtpm takes.
func signers(t testing.TB) map[string]*signer {
	t.Helper()
	return map[string]*signer{"RSA": rsaSigner(t), "P-256": ecdsaSigner(t, elliptic.P256()), "P-384": ecdsaSigner(t, elliptic.P384())}
}

// sign signs a SHA-256 hash.
func (s *signer) sign(hash []byte, err error) tpm2.TPMTSignature {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
	raw, err := s.key.Sign(rand.Reader, hash, crypto.SHA256)
	if err != nil {
		s.Fatal(err)
	}
	signature, err := authpolicy.Signature(s.key.Public(), raw)
	if err != nil {
		s.Fatal(err)
	}
	return signature
}

// state signs PCR values, for ref.
func (s *signer) state(pcr authpolicy.PCR, ref []byte) authpolicy.SignedState {
	s.Helper()
	digest, err := authpolicy.ApprovedDigest(pcr)
	if err != nil {
		s.Fatal(err)
	}
	state := authpolicy.SignedState{Bank: pcr.Bank, Digest: digest, Signature: s.sign(authpolicy.AuthorizedHash(digest, ref))}
	for i := range 24 {
		if _, ok := pcr.Values[i]; ok {
			state.PCRs = append(state.PCRs, i)
		}
	}
	return state
}

// agree signs the hash of a session's nonce and ref.
func (s *signer) agree(ref []byte) func([]byte) (tpm2.TPMTSignature, error) {
	return func(nonce []byte) (tpm2.TPMTSignature, error) { return s.sign(authpolicy.SignedHash(nonce, ref)), nil }
}
