package remote

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
)

// Key is what a verifier signs with, see [authpolicy.PublicKey] for what it may be.
// It is to be used for nothing else: what it signs has no domain separation of its
// own, since the TPM decides its form.
type Key struct{ signer crypto.Signer }

// ParseKey reads a private key in PEM, unencrypted: PKCS #8, SEC 1 or PKCS #1. The
// caller clears b.
func ParseKey(b []byte) (*Key, error) {
	block, rest := pem.Decode(b)
	if block == nil {
		return nil, errors.New("it holds no PEM block; want PRIVATE KEY")
	}
	defer clear(block.Bytes)
	if next, _ := pem.Decode(rest); next != nil {
		return nil, errors.New("a second PEM block follows the first; want one private key")
	}
	var key any
	var err error
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		return nil, fmt.Errorf("PEM block %.40q; want PRIVATE KEY, unencrypted", block.Type)
	}
	if err != nil {
		return nil, errors.New("its private key can't be read") // the parser's error could quote it
	}
	return NewKey(key)
}

// NewKey returns a key to sign with.
func NewKey(key any) (*Key, error) {
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a key of type %T; want ECDSA or RSA", key)
	}
	if _, err := authpolicy.PublicKey(signer.Public()); err != nil {
		return nil, err
	}
	return &Key{signer}, nil
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

// ParsePublicKey reads a verifier's public key in PEM (PUBLIC KEY), as nodes keep
// it, and returns the public area that [authpolicy.Signed] names.
func ParsePublicKey(b []byte) (tpm2.TPMTPublic, error) {
	block, rest := pem.Decode(b)
	if block == nil || block.Type != "PUBLIC KEY" {
		return tpm2.TPMTPublic{}, errors.New("it holds no public key in PEM; want what kleidi verifier show prints")
	}
	if next, _ := pem.Decode(rest); next != nil {
		return tpm2.TPMTPublic{}, errors.New("a second PEM block follows the first; want one public key")
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return tpm2.TPMTPublic{}, err
	}
	return authpolicy.PublicKey(key)
}
