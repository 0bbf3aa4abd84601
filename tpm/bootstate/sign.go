package bootstate

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
)

var (
	// ErrOtherKey: the state claims a signature by a key other than the given one.
	ErrOtherKey = errors.New("signed by another key")
	// ErrSignature: the signature is not a signature of the given key over this boot
	// state.
	ErrSignature = authpolicy.ErrSignature
)

// Sign signs a boot state. The signer's key must be of a kind that ParsePrivateKey
// accepts; it may be in a token. ref is 0 to MaxRef bytes, and empty for a state that
// systemd accepts too. As with systemd, PCR 11 may stand alone, because the slot
// demands other PCRs itself. Sign verifies the signature before it returns it, because
// tokens make mistakes.
func Sign(signer crypto.Signer, pcr authpolicy.PCR, ref []byte, what string) (State, error) {
	digest, err := authpolicy.ApprovedDigest(pcr)
	if err != nil {
		return State{}, err
	}
	hash, err := authpolicy.AuthorizedHash(digest, ref)
	if err != nil {
		return State{}, err
	}
	fingerprint, err := KeyFingerprint(signer.Public())
	if err != nil {
		return State{}, err
	}
	s := State{
		Bank: pcr.Bank, PCRs: slices.Sorted(maps.Keys(pcr.Values)), KeyFingerprint: fingerprint,
		Digest: digest, Ref: bytes.Clone(ref), What: what,
	}
	if s.Signature, err = signer.Sign(rand.Reader, hash, crypto.SHA256); err != nil {
		return State{}, fmt.Errorf("sign: %w", err)
	}
	if err := s.check(); err != nil {
		return State{}, err
	}
	return s, s.Verify(signer.Public())
}

// Verify reports whether the owner of pub signed this boot state: the state has a form
// that a file can hold, it names pub, and the signature over Digest and Ref is pub's.
// Nothing vouches for What, and Verify does not know which PCR values Digest stands
// for. For the last two checks the error is ErrOtherKey or ErrSignature.
func (s State) Verify(pub crypto.PublicKey) error {
	if err := s.check(); err != nil {
		return err
	}
	fingerprint, err := KeyFingerprint(pub)
	if err != nil {
		return err
	}
	if fingerprint != s.KeyFingerprint {
		return fmt.Errorf("boot state %s: %w (pkfp %x, want %x); give the public key that belongs to the signature", s, ErrOtherKey, s.KeyFingerprint[:8], fingerprint[:8])
	}
	hash, err := authpolicy.AuthorizedHash(s.Digest, s.Ref)
	if err != nil {
		return err
	}
	ok := false
	switch k := pub.(type) {
	case *rsa.PublicKey:
		ok = rsa.VerifyPKCS1v15(k, crypto.SHA256, hash, s.Signature) == nil
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(k, hash, s.Signature)
	}
	if !ok {
		return fmt.Errorf("boot state %s: %w%s", s, ErrSignature, hint(s))
	}
	return nil
}

// hint explains a frequent failure: systemd-measure once signed with the bank's hash,
// as the version of Debian 12 does. No TPM accepts that for a key whose Name is a
// SHA-256 Name.
func hint(s State) string {
	if s.Bank != crypto.SHA256 {
		return "; sign it with SHA-256, whatever the bank (older systemd-measure uses the bank's hash)"
	}
	return "; sign it again"
}

// Signed returns the states that the owner of the key signed with that policyRef, in
// the order of the file, and an error for each other state that claims so. A bad state
// does not prevent the others from opening a slot.
func (f *File) Signed(key tpm2.TPMTPublic, ref []byte) (states []authpolicy.SignedState, refused []error) {
	pub, err := tpm2.Pub(key)
	if err != nil {
		return nil, []error{fmt.Errorf("public key of signed boot states: %w", err)}
	}
	fingerprint, err := KeyFingerprint(pub)
	if err != nil {
		return nil, []error{fmt.Errorf("public key of signed boot states: %w", err)}
	}
	for _, s := range f.Select(fingerprint, ref) {
		if signed, err := s.forTPM(pub); err != nil {
			refused = append(refused, err)
		} else {
			states = append(states, signed)
		}
	}
	return states, refused
}

// forTPM returns a verified state in the form that the TPM expects.
func (s State) forTPM(pub crypto.PublicKey) (authpolicy.SignedState, error) {
	if err := s.Verify(pub); err != nil {
		return authpolicy.SignedState{}, err
	}
	sig, err := authpolicy.Signature(pub, s.Signature)
	if err != nil {
		return authpolicy.SignedState{}, fmt.Errorf("boot state %s: %w", s, err)
	}
	signed := authpolicy.SignedState{Bank: s.Bank, PCRs: s.PCRs, Digest: s.Digest, Signature: sig}
	if err := signed.Check(); err != nil {
		return authpolicy.SignedState{}, fmt.Errorf("boot state %s: %w; sign one without it", s, err)
	}
	return signed, nil
}
