package keyring

import (
	"crypto/cipher"
	"sync"
	"sync/atomic"

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

// dekSeeds is one KEK's cipher for DEK seeds. That of a retired KEK is made for the
// first DEK seed that was encrypted under it: most retired KEKs are never asked for,
// so opening a keyring stays fast and no key schedule of theirs lies on the heap.
type dekSeeds struct {
	cipher  atomic.Pointer[seedCipher]
	mu      sync.Mutex // held while the cipher is made
	retired []retired  // the one KEK to make the cipher of; nil if the cipher was made at once
}

// seedCipher encrypts and decrypts DEK seeds under one KEK. All that it needs is
// derived once, so that an operation allocates its result and nothing else.
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

// wellFormed reports whether decrypt can make something of a ciphertext.
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

// cipherOf returns the cipher of one of the keyring's KEKs, and makes it if this is
// the first call that needs it.
func (k *Keyring) cipherOf(d *dekSeeds) (*seedCipher, error) {
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
