// Package authpolicy computes the authorization policies under which a TPM
// unseals a KEK, and satisfies them.
//
// An authorization policy is a conjunction of terms, in order. Each term is written once,
// as a TPM command (TPM 2.0 Library, Part 3, section 23). Both the digest of the sealed
// object, which is computed here without a TPM, and the command that a TPM checks before it
// unseals are derived from it.
package authpolicy

import (
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// ErrEpoch says that the epoch counter has passed the authorization policy's epoch.
var ErrEpoch = errors.New("the epoch has passed")

// ErrCounter says that the epoch counter is missing, or that another index has its number.
var ErrCounter = errors.New("the epoch counter is not the expected one")

// Term is one condition.
type Term interface {
	// extend adds the term to a digest.
	extend(*tpm2.PolicyCalculator) error
	// satisfy makes the TPM check the term in a session.
	satisfy(transport.TPM, tpm2.Session) error
}

// Terms is an authorization policy: all terms must hold, in this order.
// [Authorized] can only be the first, because it discards the terms before it.
type Terms []Term

func (ts Terms) check() error {
	for i, term := range ts {
		if _, ok := term.(Authorized); ok && i > 0 {
			return errors.New("a signed boot state is not the first term: it would undo those before it")
		}
	}
	return nil
}

// Digest returns the SHA-256 authorization policy digest, 32 bytes.
func (ts Terms) Digest() ([]byte, error) {
	if err := ts.check(); err != nil {
		return nil, err
	}
	calc, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	for _, t := range ts {
		if err := t.extend(calc); err != nil {
			return nil, err
		}
	}
	return calc.Hash().Digest, nil
}

// Satisfy runs all terms in a policy session that was just opened, with a nonce of
// [NonceSize] bytes. It stops at the first term that the TPM refuses, and wraps one of this
// package's errors if the cause is known. Authorized and Signed need one free slot for a
// transient object beside the session, and free it again.
//
// A signer is asked once the other terms are known to hold, and before the terms that
// count: an answer takes time, and a PCR that is extended after TPM2_PolicyPCR, by IMA
// for instance, ends the session for good. Nothing is lost by the order: the signature
// is for the session's nonce, and the TPM checks every term after it.
func (ts Terms) Satisfy(t transport.TPM, session tpm2.Session) error {
	if err := ts.check(); err != nil {
		return err
	}
	if slices.ContainsFunc(ts, isSigned) {
		if err := slices.DeleteFunc(slices.Clone(ts), isSigned).run(t, session); err != nil {
			return err
		}
		agreed, err := ts.ask(session)
		if err != nil {
			return err
		}
		if err := policyRestart(t, session.Handle()); err != nil {
			return fmt.Errorf("TPM2_PolicyRestart: %w", err)
		}
		ts = agreed
	}
	return ts.run(t, session)
}

func (ts Terms) run(t transport.TPM, session tpm2.Session) error {
	for _, term := range ts {
		if err := term.satisfy(t, session); err != nil {
			return err
		}
	}
	return nil
}

// notTheCounter are the response codes that PolicyNV returns only if the index is missing,
// was never written, or does not let everybody read 8 bytes of it.
var notTheCounter = []tpm2.TPMRC{
	tpm2.TPMRCHandle, tpm2.TPMRCNVUninitialized, tpm2.TPMRCNVAuthorization, tpm2.TPMRCNVLocked, tpm2.TPMRCNVRange,
	tpm2.TPMRCSize, tpm2.TPMRCAuthUnavailable, tpm2.TPMRCAuthType, tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail,
}

// ask obtains every signer's agreement to the session, and returns the terms with their
// signatures.
func (ts Terms) ask(session tpm2.Session) (Terms, error) {
	agreed := slices.Clone(ts)
	for i, term := range ts {
		s, ok := term.(Signed)
		if !ok {
			continue
		}
		if err := checkRef(s.Ref); err != nil {
			return nil, err
		}
		if s.Sign == nil {
			return nil, fmt.Errorf("%w: there is no signer to ask", ErrSignature)
		}
		signature, err := s.Sign(session.NonceTPM().Buffer)
		if err != nil {
			return nil, err
		}
		if err := checkSignature(signature); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrSignature, err)
		}
		s.signature = signature
		agreed[i] = s
	}
	return agreed, nil
}

func isSigned(t Term) bool { _, ok := t.(Signed); return ok }
