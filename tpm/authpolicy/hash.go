package authpolicy

import (
	"crypto/sha256"
	"fmt"
)

func hash(parts ...[]byte) []byte {
	h := sha256.New()
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

func checkRef(ref []byte) error {
	if len(ref) > MaxRef {
		return fmt.Errorf("a reference of %d bytes, at most %d fit", len(ref), MaxRef)
	}
	return nil
}

// MaxRef is how long a reference may be, in bytes: one SHA-256 digest. TPMs take
// at least that much for a policyRef.
const MaxRef = sha256.Size
