package grpcserver

import "github.com/beezy-dev/kleidi/seal"

// Keys encrypts and decrypts DEK seeds, in memory, concurrently. While no KEK is open,
// every method fails with a [*seal.Error]. Otherwise the errors are seal.ErrUnknownKey,
// seal.ErrMalformed and seal.ErrAuthentication.
type Keys interface {
	// CurrentID returns the key ID that Encrypt uses now.
	CurrentID() (seal.KeyID, error)
	// Encrypt returns the ciphertext, at most MaxCiphertext bytes, and the key ID of
	// the KEK that made it. It does not keep plaintext.
	Encrypt(plaintext []byte) ([]byte, seal.KeyID, error)
	// Decrypt returns a plaintext that the caller must clear.
	Decrypt(id seal.KeyID, ciphertext []byte) ([]byte, error)
}

// Callers is told what each connection learns of the key ID. A connection is a comparable
// value without a meaning of its own.
type Callers interface {
	// Answered is told of the key ID in an answer to Status or Encrypt.
	Answered(conn any, id seal.KeyID, encrypted bool)
	// Ended is told that a connection is closed.
	Ended(conn any)
}

// noCallers is told for nothing.
type noCallers struct{}

func (noCallers) Answered(any, seal.KeyID, bool) {}
func (noCallers) Ended(any)                      {}
