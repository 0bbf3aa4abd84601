package pkcs11

import (
	"testing"

	"github.com/beezy-dev/kleidi/e2e/site"
)

// TestNothingLeftOfTwoOfTwo: after 10,000 wraps by a TPM and a token. (Package hsm has
// the token alone.)
func TestNothingLeftOfTwoOfTwo(t *testing.T) {
	k := newToken(t)
	first, _ := site.NewTPM(t)
	site.NothingLeft(t, site.Pair(first, k.wrapper()))
}
