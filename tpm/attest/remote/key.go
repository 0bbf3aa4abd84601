package remote

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"
)

// Key is what a verifier signs with: ECDSA P-256 or RSA of 2048 to 4096 bits. It
// is to be used for nothing else: what it signs has no domain separation of its
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
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		if k.Curve != elliptic.P256() {
			return nil, fmt.Errorf("an ECDSA key on %s; want P-256", k.Curve.Params().Name)
		}
		return &Key{k}, nil
	case *rsa.PrivateKey:
		if n := k.N.BitLen(); n < 2048 || n > 4096 {
			return nil, fmt.Errorf("an RSA key of %d bits; want 2048 to 4096", n)
		}
		return &Key{k}, nil
	}
	return nil, fmt.Errorf("a key of type %T; want ECDSA P-256 or RSA", key)
}

// Public returns the public key, which slots' authorization policies name.
func (k *Key) Public() crypto.PublicKey { return k.signer.Public() }

// String keeps the key out of logs.
func (k *Key) String() string { return "remote.Key" }

// GoString keeps the key out of logs.
func (k *Key) GoString() string { return "remote.Key" }

// sign returns a TPMT_SIGNATURE over a SHA-256 digest: ECDSA, or RSASSA.
func (k *Key) sign(digest []byte) ([]byte, error) {
	raw, err := k.signer.Sign(rand.Reader, digest, crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	if _, ok := k.signer.(*rsa.PrivateKey); ok {
		return tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgRSASSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSASSA,
			&tpm2.TPMSSignatureRSA{Hash: tpm2.TPMAlgSHA256, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: raw}})}), nil
	}
	var point struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(raw, &point); err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	r, s := point.R.FillBytes(make([]byte, 32)), point.S.FillBytes(make([]byte, 32))
	return tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA,
		&tpm2.TPMSSignatureECC{Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: r}, SignatureS: tpm2.TPM2BECCParameter{Buffer: s}})}), nil
}
