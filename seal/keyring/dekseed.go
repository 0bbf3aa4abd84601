package keyring

import (
	"crypto/cipher"
	"sync"
	"sync/atomic"

	"github.com/beezy-dev/kleidi/seal"
)

// gcmOverhead is the number of bytes that AES-GCM adds: a nonce of 12 bytes before
// the ciphertext, and a tag of 16 bytes after it.
const gcmOverhead = 28

// dekSeedFormat is the first byte of every DEK seed's ciphertext.
const dekSeedFormat = 1

// Sizes in bytes. KMS v2 allows a ciphertext of 1024.
const (
	// MaxPlaintext is the maximum size of a DEK seed.
	MaxPlaintext = MaxCiphertext - 1 - gcmOverhead
	// MaxCiphertext is the maximum size of an encrypted DEK seed.
	MaxCiphertext = 1024
)

// dekSeeds holds one KEK's cipher for DEK seeds. The cipher of a retired KEK is made
// when the first DEK seed is decrypted under it. Most retired KEKs are never used,
// so opening a keyring stays fast, and their key schedules are not on the heap.
type dekSeeds struct {
	cipher  atomic.Pointer[seedCipher]
	mu      sync.Mutex // held while the cipher is made
	retired []retired  // the one KEK to make the cipher of; nil if the cipher was made at once
}

// seedCipher encrypts and decrypts DEK seeds under one KEK. Everything is derived
// once, so that an operation allocates only its result.
type seedCipher struct {
	aead cipher.AEAD
	aad  []byte
}

func newSeedCipher(cluster seal.ClusterID, id seal.KeyID, kek []byte) *seedCipher {
	return &seedCipher{aead: aead(kek, labelDEKSeed), aad: frame(string(cluster[:]), string(id))}
}

func (d *seedCipher) encrypt(plaintext []byte) ([]byte, error) {
	if len(plaintext) == 0 || len(plaintext) > MaxPlaintext {
		return nil, seal.ErrMalformed
	}
	out := make([]byte, 1, 1+gcmOverhead+len(plaintext))
	out[0] = dekSeedFormat
	return d.aead.Seal(out, nil, plaintext, d.aad), nil
}

// wellFormed reports whether ciphertext has the size and the first byte of an
// encrypted DEK seed.
func wellFormed(ciphertext []byte) bool {
	return len(ciphertext) > 1+gcmOverhead && len(ciphertext) <= MaxCiphertext && ciphertext[0] == dekSeedFormat
}

func (d *seedCipher) decrypt(ciphertext []byte) ([]byte, error) {
	plaintext, err := d.aead.Open(nil, nil, ciphertext[1:], d.aad)
	if err != nil {
		return nil, seal.ErrAuthentication
	}
	return plaintext, nil
}

// cipherOf returns the cipher of d, which is one of k's. It makes the cipher on the
// first call.
func cipherOf(k *Keyring, d *dekSeeds) (*seedCipher, error) {
	if c := d.cipher.Load(); c != nil {
		return c, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if c := d.cipher.Load(); c != nil {
		return c, nil
	}
	err := ErrClosed
	withKEK(k.kek.secret, func(kek []byte) {
		err = k.doc.openRetired(d.retired, kek, func(r retired, old []byte) error {
			d.cipher.Store(newSeedCipher(k.doc.ClusterID, r.KeyID, old))
			return nil
		})
	})
	return d.cipher.Load(), err
}
