package bootstate

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
)

// maxKey bounds a key file, in bytes.
const maxKey = 64 << 10

// makeKey is the hint to make another key.
const makeKey = "make one that TPMs verify: openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048"

// checkKey refuses keys whose signatures no TPM verifies.
func checkKey(pub crypto.PublicKey) error {
	if _, ok := pub.(ed25519.PublicKey); ok {
		return fmt.Errorf("an Ed25519 key, which TPMs don't verify; %s", makeKey)
	}
	if _, err := authpolicy.PublicKey(pub); err != nil {
		return fmt.Errorf("%w; %s", err, makeKey)
	}
	return nil
}

// ParsePublicKey reads an operator's public key: PEM, SubjectPublicKeyInfo or PKCS #1,
// RSA of 2048, 3072 or 4096 bits or ECDSA on P-256 or P-384. It ignores zeros after the
// key, which pad a section of a PE file.
func ParsePublicKey(file []byte) (crypto.PublicKey, error) {
	block, err := onlyBlock(file)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	var pub crypto.PublicKey
	switch {
	case strings.HasSuffix(block.Type, "PRIVATE KEY"):
		clear(block.Bytes)
		return nil, errors.New("public key: this is a private key; keep it offline and give its public half: openssl pkey -pubout")
	case block.Type == "RSA PUBLIC KEY":
		pub, err = x509.ParsePKCS1PublicKey(block.Bytes)
	case block.Type == "PUBLIC KEY":
		pub, err = x509.ParsePKIXPublicKey(block.Bytes)
	default:
		return nil, fmt.Errorf("public key: a PEM block %q, want PUBLIC KEY; make it with openssl pkey -pubout", clip(block.Type))
	}
	if err != nil {
		return nil, fmt.Errorf("public key: %w; make it with openssl pkey -pubout", err)
	}
	if err := checkKey(pub); err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	return pub, nil
}

// ParsePrivateKey reads an operator's private key: PEM, PKCS #8, PKCS #1 or SEC 1, of
// the kinds that ParsePublicKey accepts, not encrypted. The caller erases file.
func ParsePrivateKey(file []byte) (crypto.Signer, error) {
	block, err := onlyBlock(file)
	if err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	defer clear(block.Bytes)
	if block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "" || strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED") {
		return nil, errors.New("private key: it is encrypted; decrypt it into memory for the moment of signing: openssl pkey -in KEY -out /dev/shm/KEY")
	}
	var key any
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "PUBLIC KEY", "RSA PUBLIC KEY":
		return nil, errors.New("private key: this is a public key; give the private key to sign with")
	default:
		return nil, fmt.Errorf("private key: a PEM block %q, want PRIVATE KEY; %s", clip(block.Type), makeKey)
	}
	if err != nil {
		return nil, fmt.Errorf("private key: it does not parse (%s); %s", block.Type, makeKey)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("private key: a %T can't sign; %s", key, makeKey)
	}
	if err := checkKey(signer.Public()); err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	return signer, nil
}

// onlyBlock returns the only PEM block of a file. Before an EC key it accepts the
// separate block in which OpenSSL puts the name of the curve.
func onlyBlock(file []byte) (*pem.Block, error) {
	if len(file) > maxKey {
		return nil, fmt.Errorf("%d bytes, want at most %d; give a file that holds one key in PEM", len(file), maxKey)
	}
	block, rest := pem.Decode(file)
	if block != nil && block.Type == "EC PARAMETERS" {
		block, rest = pem.Decode(rest)
	}
	if block == nil {
		return nil, errors.New("no PEM block; want a key in PEM, as openssl writes it")
	}
	if len(bytes.Trim(rest, " \t\r\n\x00")) > 0 {
		clear(block.Bytes)
		return nil, errors.New("something follows the key; give a file that holds one key in PEM")
	}
	return block, nil
}

// clip shortens and quotes text from a file for a message.
func clip(s string) string {
	const most = 200
	q := strconv.Quote(s[:min(len(s), most)])
	return q[1 : len(q)-1]
}
