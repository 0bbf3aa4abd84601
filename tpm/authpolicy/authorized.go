package authpolicy

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// ErrNoSignedState says that no boot state is signed for the present PCR values.
var ErrNoSignedState = errors.New("no signed boot state has the present PCR values")

// Authorized is the condition that the PCRs are in a state that the holder of a key has
// signed: TPM2_PolicyAuthorize. The authorization policy depends on Key and Ref alone, so
// states can be signed later. A signed state cannot be unsigned: only an [Epoch] revokes it.
//
// A signed state of PCR 11 alone, as systemd signs them, protects nothing by itself (see
// [PCR.Check]), so a PCR term must follow.
type Authorized struct {
	// Key is the signer's public key, made by [PublicKey].
	Key tpm2.TPMTPublic
	// Ref is signed with each state and separates the purposes of one key: 0 to 32
	// bytes. systemd signs its states without a reference.
	Ref []byte
	// States are the signed states to choose from. They are untrusted: the TPM verifies
	// them.
	States []SignedState
}

// SignedState is a statement by the holder of a key that approves PCR values.
type SignedState struct {
	// Bank is crypto.SHA256 or crypto.SHA384.
	Bank crypto.Hash
	// PCRs are the PCRs' indices, in rising order.
	PCRs []int
	// Digest represents their values: the 32 bytes that [ApprovedDigest] returns.
	Digest []byte
	// Signature is over [AuthorizedHash] of Digest.
	Signature tpm2.TPMTSignature
}

// Check refuses a state that no TPM could satisfy, and resettable PCRs.
func (s SignedState) Check() error {
	if _, ok := Banks[s.Bank]; !ok {
		return fmt.Errorf("PCR bank %v; want SHA-256 or SHA-384", s.Bank)
	}
	if len(s.PCRs) == 0 {
		return errors.New("no PCRs")
	}
	for n, i := range s.PCRs {
		switch {
		case i < 0 || i > 23:
			return fmt.Errorf("PCR %d does not exist", i)
		case resettable(i):
			return fmt.Errorf("PCR %d can be reset without a reboot", i)
		case n > 0 && i <= s.PCRs[n-1]:
			return fmt.Errorf("PCR %d is named twice or out of order", i)
		}
	}
	if len(s.Digest) != sha256.Size {
		return fmt.Errorf("a digest of %d bytes, want %d", len(s.Digest), sha256.Size)
	}
	return checkSignature(s.Signature)
}

// ApprovedDigest returns the digest that represents PCR values in a signed boot state: the
// policy digest of TPM2_PolicyPCR alone, 32 bytes. PCR 11 alone is accepted, see
// [Authorized].
func ApprovedDigest(p PCR) ([]byte, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	calc, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	if err := p.demand().Update(calc); err != nil {
		return nil, err
	}
	return calc.Hash().Digest, nil
}

// AuthorizedHash returns the SHA-256 hash that the signer of a boot state signs: the aHash
// of TPM2_PolicyAuthorize, over approved from [ApprovedDigest] and over ref.
func AuthorizedHash(approved, ref []byte) ([]byte, error) {
	if len(approved) != sha256.Size {
		return nil, fmt.Errorf("a digest of %d bytes, want %d", len(approved), sha256.Size)
	}
	if err := checkRef(ref); err != nil {
		return nil, err
	}
	return hash(approved, ref), nil
}

func (a Authorized) command() (tpm2.PolicyAuthorize, error) {
	if err := checkRef(a.Ref); err != nil {
		return tpm2.PolicyAuthorize{}, err
	}
	name, err := Name(a.Key)
	return tpm2.PolicyAuthorize{PolicyRef: tpm2.TPM2BDigest{Buffer: a.Ref}, KeySign: tpm2.TPM2BName{Buffer: name}}, err
}

func (a Authorized) extend(calc *tpm2.PolicyCalculator) error {
	cmd, err := a.command()
	if err != nil {
		return err
	}
	calc.Reset() // as the TPM does; go-tpm's Update leaves it out
	return cmd.Update(calc)
}

func (a Authorized) satisfy(t transport.TPM, session tpm2.Session) error {
	cmd, err := a.command()
	if err != nil {
		return err
	}
	cmd.PolicySession = session.Handle()
	if cmd.ApprovedPolicy.Buffer, cmd.CheckTicket, err = a.approved(t, session.Handle()); err != nil {
		return err
	}
	if _, err := cmd.Execute(t); err != nil {
		return fmt.Errorf("TPM2_PolicyAuthorize: %w", err)
	}
	return nil
}

// approved leaves the session with the digest of the present values of some state's PCRs.
// It returns that digest, and the TPM's ticket that a signature over it verified. It goes
// on to the next state after a signature that does not verify.
func (a Authorized) approved(t transport.TPM, session tpm2.TPMISHPolicy) (digest []byte, ticket tpm2.TPMTTKVerified, err error) {
	for i, s := range a.States {
		if err := s.Check(); err != nil {
			return nil, ticket, fmt.Errorf("signed boot state %d: %w", i+1, err)
		}
	}
	failed := ErrNoSignedState
	for rest := a.States; len(rest) > 0; {
		same, others := split(rest, rest[0].samePCRs)
		digest, err := presentDigest(t, session, same[0])
		if err != nil {
			return nil, ticket, err
		}
		if found, _ := split(same, func(s SignedState) bool { return bytes.Equal(s.Digest, digest) }); len(found) > 0 {
			if ticket, err = a.ticket(t, found); !errors.Is(err, ErrSignature) {
				return digest, ticket, err
			}
			failed = err
		}
		rest = others
	}
	return nil, ticket, failed
}

func (s SignedState) samePCRs(other SignedState) bool {
	return s.Bank == other.Bank && slices.Equal(s.PCRs, other.PCRs)
}

func split(states []SignedState, by func(SignedState) bool) (in, out []SignedState) {
	for _, s := range states {
		if by(s) {
			in = append(in, s)
		} else {
			out = append(out, s)
		}
	}
	return in, out
}

// presentDigest restarts the session and returns its digest after TPM2_PolicyPCR with the
// present values of a state's PCRs.
func presentDigest(t transport.TPM, session tpm2.TPMISHPolicy, s SignedState) ([]byte, error) {
	if err := policyRestart(t, session); err != nil {
		return nil, fmt.Errorf("TPM2_PolicyRestart: %w", err)
	}
	// Without an expected digest the TPM uses the PCRs' present values.
	if _, err := (tpm2.PolicyPCR{PolicySession: session, Pcrs: Selection(s.Bank, s.PCRs)}).Execute(t); err != nil {
		return nil, fmt.Errorf("TPM2_PolicyPCR: %w", err)
	}
	r, err := tpm2.PolicyGetDigest{PolicySession: session}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("TPM2_PolicyGetDigest: %w", err)
	}
	return r.PolicyDigest.Buffer, nil
}

// ticket returns the TPM's own statement that one of the states is signed. All of them
// have the same digest.
func (a Authorized) ticket(t transport.TPM, states []SignedState) (ticket tpm2.TPMTTKVerified, err error) {
	signed, err := AuthorizedHash(states[0].Digest, a.Ref)
	if err != nil {
		return ticket, err
	}
	err = withKey(t, a.Key, func(key tpm2.NamedHandle) (err error) {
		for _, s := range states {
			var r *tpm2.VerifySignatureResponse
			r, err = tpm2.VerifySignature{KeyHandle: key, Digest: tpm2.TPM2BDigest{Buffer: signed}, Signature: s.Signature}.Execute(t)
			if err == nil {
				ticket = r.Validation
				return nil
			}
			err = signatureError("TPM2_VerifySignature", err)
			if !errors.Is(err, ErrSignature) {
				return err
			}
		}
		return err
	})
	return ticket, err
}
