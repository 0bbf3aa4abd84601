package pkcs11

import (
	"testing"

	"github.com/beezy-dev/kleidi/e2e/site"
)

// TestNothingLeftOfTwoOfTwo: 10,000 wraps with a TPM and a token leave nothing behind.
// (Package hsm tests the token alone.)
func TestNothingLeftOfTwoOfTwo(t *testing.T) {
	k := newSoftHSM(t)
	first, _ := site.NewTPM(t)
	site.NothingLeft(t, site.Pair(first, k.wrapper()))
}

// TestNothingLeftInServe: the whole kleidi keeps nothing either, whether the token
// works or fails.
func TestNothingLeftInServe(t *testing.T) {
	k := newSoftHSM(t)
	s := newSite(t, k, "[tpm, pkcs11]")
	s.StaysSmall(func() { s.Do("slot test", "opens") })
	s.StaysSmall(func() { s.Do("rotate") })
	k.fault("killed")
	s.StaysSmall(func() { s.Refuse("rotate", "CKR_SESSION_HANDLE_INVALID") })
	k.fault("gone")
	s.StaysSmall(func() { s.Refuse("rotate", "the token is not there") })
	s.Decrypts()
}
