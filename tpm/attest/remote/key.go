package remote

import (
	"crypto"
	"crypto/rand"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
)

// Key is a verifier's signing key; [authpolicy.PublicKey] says which kinds of keys it
// accepts. Use the key for nothing else: the TPM decides the form of the signed
// message, which has no domain separation.
type Key struct {
	signer crypto.Signer
	name   []byte // the Name of its public area
}

// NewKey returns a key to sign with.
func NewKey(signer crypto.Signer) (*Key, error) {
	public, err := authpolicy.PublicKey(signer.Public())
	if err != nil {
		return nil, err
	}
	name, err := authpolicy.Name(public)
	if err != nil {
		return nil, err
	}
	return &Key{signer, name}, nil
}

// Public returns the public key, which slots' authorization policies name.
func (k *Key) Public() crypto.PublicKey { return k.signer.Public() }

// String keeps the key out of logs.
func (k *Key) String() string { return "remote.Key" }

// GoString keeps the key out of logs.
func (k *Key) GoString() string { return "remote.Key" }

// sign returns a TPMT_SIGNATURE over a SHA-256 digest.
func (k *Key) sign(digest []byte) ([]byte, error) {
	raw, err := k.signer.Sign(rand.Reader, digest, crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	s, err := authpolicy.Signature(k.signer.Public(), raw)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	return tpm2.Marshal(s), nil
}
