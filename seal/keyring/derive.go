package keyring

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"fmt"
	"hash"

	"github.com/beezy-dev/kleidi/seal"
)

// keyIDPrefix distinguishes key IDs of this form from later forms.
const keyIDPrefix = "k1-"

var keyIDEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// frame joins fields so that two different lists of fields never give the same
// bytes: it writes the length of each field, 8 bytes big-endian, before the field.
func frame(fields ...string) []byte { return appendFrame(nil, fields...) }

func appendFrame(b []byte, fields ...string) []byte {
	for _, f := range fields {
		b = binary.BigEndian.AppendUint64(b, uint64(len(f)))
		b = append(b, f...)
	}
	return b
}

// NewKeyID returns the key ID of kek in a cluster: "k1-" and the lower-case,
// unpadded base32 of HMAC-SHA256(kek, frame("kleidi key id v1", cluster ID)),
// 55 characters. It is empty if kek is closed or not seal.KEKSize bytes.
func NewKeyID(cluster seal.ClusterID, kek *seal.Secret) (id seal.KeyID) {
	withKEK(kek, func(b []byte) { id = keyID(cluster, b) })
	return id
}

func keyID(cluster seal.ClusterID, kek []byte) seal.KeyID {
	sum := mac(kek, frame(labelKeyID, string(cluster[:])))
	return seal.KeyID(keyIDPrefix + keyIDEncoding.EncodeToString(sum))
}

// withKeyIDMatcher calls f with a function that reports whether a KEK has a key ID. It
// serves to check many KEKs. Allocations inside [seal.Erase] are slow, so the checks
// share all memory except that of HMAC itself.
func withKeyIDMatcher(cluster seal.ClusterID, f func(matches func(id seal.KeyID, kek []byte) bool) error) (err error) {
	msg, got, want := frame(labelKeyID, string(cluster[:])), make([]byte, 0, sha256.Size), make([]byte, sha256.Size)
	scrubbed(func(h func() hash.Hash) {
		one, other := h(), h()
		next := func() hash.Hash {
			one, other = other, one
			one.Reset()
			return one
		}
		err = f(func(id seal.KeyID, kek []byte) bool {
			m := hmac.New(next, kek)
			m.Write(msg)
			got = m.Sum(got[:0])
			_, err := keyIDEncoding.Decode(want, []byte(id[len(keyIDPrefix):]))
			return err == nil && hmac.Equal(got, want)
		})
	})
	return err
}

// ValidKeyID reports whether id has the form that NewKeyID returns.
func ValidKeyID(id seal.KeyID) bool { return validKeyID(id) }

func validKeyID(id seal.KeyID) bool {
	if len(id) != len(keyIDPrefix)+keyIDEncoding.EncodedLen(sha256.Size) || id[:len(keyIDPrefix)] != keyIDPrefix {
		return false
	}
	sum, err := keyIDEncoding.DecodeString(string(id[len(keyIDPrefix):]))
	return err == nil && keyIDEncoding.EncodeToString(sum) == string(id[len(keyIDPrefix):])
}

// withKEK calls f with the bytes of kek, and reports whether it did. It does not
// call f if kek is nil, closed or not of seal.KEKSize bytes.
func withKEK(kek *seal.Secret, f func(b []byte)) (called bool) {
	if kek == nil {
		return false
	}
	kek.With(func(b []byte) {
		if called = len(b) == seal.KEKSize; called {
			f(b)
		}
	})
	return called
}

// derive calls f with the 32 bytes HKDF-SHA256(kek, no salt, label), and erases them
// when f returns.
func derive(kek []byte, label string, f func(key []byte)) {
	var key []byte
	scrubbed(func(h func() hash.Hash) {
		var err error
		if key, err = hkdf.Key(h, kek, nil, label, 32); err != nil {
			panic(fmt.Sprintf("hkdf: %v", err)) // possible only for other sizes
		}
	})
	defer clear(key)
	f(key)
}

// mac returns HMAC-SHA256(key, msg).
func mac(key, msg []byte) (sum []byte) {
	scrubbed(func(h func() hash.Hash) {
		m := hmac.New(h, key)
		m.Write(msg)
		sum = m.Sum(nil)
	})
	return sum
}

// aead returns AES-256-GCM with random nonces under the key HKDF(kek, label). The key
// schedule stays on the heap as long as the cipher, because Go's AES allocates it
// there.
func aead(kek []byte, label string) (c cipher.AEAD) {
	derive(kek, label, func(key []byte) {
		block, err := aes.NewCipher(key)
		if err == nil {
			c, err = cipher.NewGCMWithRandomNonce(block)
		}
		if err != nil {
			panic(fmt.Sprintf("aes-gcm: %v", err)) // possible only for other sizes
		}
	})
	return c
}

// scrubbed calls f with a function that returns SHA-256 states. Then it overwrites
// each state, and the stack that f used. A state keeps the last block that was
// written to it, and the extract step of HKDF writes the KEK itself.
func scrubbed(f func(h func() hash.Hash)) {
	var states []hash.Hash
	wipeStack() // grow the stack now: a stack that grows later leaves a copy behind
	f(func() hash.Hash {
		s := sha256.New()
		states = append(states, s)
		return s
	})
	var zero [sha256.BlockSize]byte
	for _, s := range states {
		s.Reset()
		s.Write(zero[:1]) // a whole block would bypass the buffer
		s.Write(zero[1:])
	}
	wipeStack()
}

// wipeStack overwrites the stack below its caller.
//
//go:noinline
func wipeStack() byte {
	var b [8 << 10]byte
	for i := range b {
		b[i] = byte(i)
	}
	return b[len(b)/2]
}
