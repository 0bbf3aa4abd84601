package keyring

import (
	"crypto/cipher"

	"github.com/beezy-dev/kleidi/seal"
)

// gcmOverhead is what AES-GCM adds: a nonce of 12 bytes before and a tag of 16
// bytes behind the ciphertext.
const gcmOverhead = 28

// dekSeedFormat is the first byte of every DEK seed's ciphertext.
const dekSeedFormat = 1

// Sizes in bytes. KMS v2 allows a ciphertext of 1024.
const (
	// MaxPlaintext is the longest DEK seed that Encrypt takes.
	MaxPlaintext = MaxCiphertext - 1 - gcmOverhead
	// MaxCiphertext is the longest ciphertext that Decrypt takes.
	MaxCiphertext = 1024
)

// dekSeeds encrypts and decrypts DEK seeds under one KEK. All that it needs is
// derived once, so that an operation allocates its result and nothing else.
type dekSeeds struct {
	id   seal.KeyID
	aead cipher.AEAD
	aad  []byte
}

func newDEKSeeds(cluster seal.ClusterID, id seal.KeyID, kek []byte) *dekSeeds {
	return &dekSeeds{id: id, aead: aead(kek, labelDEKSeed), aad: frame(string(cluster[:]), string(id))}
}

func (d *dekSeeds) encrypt(plaintext []byte) ([]byte, error) {
	if len(plaintext) == 0 || len(plaintext) > MaxPlaintext {
		return nil, seal.ErrMalformed
	}
	out := make([]byte, 1, 1+gcmOverhead+len(plaintext))
	out[0] = dekSeedFormat
	return d.aead.Seal(out, nil, plaintext, d.aad), nil
}

func (d *dekSeeds) decrypt(ciphertext []byte) ([]byte, error) {
	if len(ciphertext) <= 1+gcmOverhead || len(ciphertext) > MaxCiphertext || ciphertext[0] != dekSeedFormat {
		return nil, seal.ErrMalformed
	}
	plaintext, err := d.aead.Open(nil, nil, ciphertext[1:], d.aad)
	if err != nil {
		return nil, seal.ErrAuthentication
	}
	return plaintext, nil
}
