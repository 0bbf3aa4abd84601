// Package authpolicy computes the authorization policies under which a TPM
// unseals a KEK, and satisfies them.
//
// An authorization policy is a conjunction of terms, in order. Each term is written once,
// as a TPM command (TPM 2.0 Library, Part 3, section 23). Both the digest of the sealed
// object, which is computed here without a TPM, and the command that a TPM checks before it
// unseals are derived from it.
package authpolicy

import (
	"crypto"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// ErrBootState says that PCR values differ from those in the authorization policy.
var ErrBootState = errors.New("PCR values are not the authorised ones")

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

// Banks are the PCR banks that may be sealed to, by TPM algorithm.
var Banks = map[crypto.Hash]tpm2.TPMIAlgHash{
	crypto.SHA256: tpm2.TPMAlgSHA256,
	crypto.SHA384: tpm2.TPMAlgSHA384,
}

// PCR is the condition that PCRs have exactly these values: TPM2_PolicyPCR.
type PCR struct {
	// Bank is crypto.SHA256 or crypto.SHA384.
	Bank crypto.Hash
	// Values holds the demanded values by PCR index, each of the bank's size.
	Values map[int][]byte
}

// resettable PCRs can be set back without a reboot: 16 (debug) and 23
// (application) by anyone, 17 to 22 by a dynamic launch (PC Client Platform TPM
// Profile, table 7).
func resettable(pcr int) bool { return pcr >= 16 && pcr <= 23 }

// The PCRs into which the firmware measures the programs that it starts, and the keys that
// it verifies them by (PC Client Platform Firmware Profile, table 1).
const (
	bootProgram    = 4
	secureBootKeys = 7
)

// Check refuses a selection that protects nothing: an empty one; resettable PCRs; all-zero
// PCRs, which any OS may still extend as it likes; and a selection without the boot program
// and the Secure Boot keys, because every OS on the machine shares the firmware's other
// PCRs and can extend PCRs 8 to 15 itself. Package bootrule knows more: which PCRs a set
// must hold, given what the machine measured.
func (p PCR) Check() error {
	if err := p.check(); err != nil {
		return err
	}
	if p.Values[bootProgram] == nil && p.Values[secureBootKeys] == nil {
		return fmt.Errorf("PCR %s alone protects nothing: any OS can have the same values; add PCR 4 or 7", p.list())
	}
	return nil
}

// check is Check without the rule about PCR 4 and 7.
func (p PCR) check() error {
	if _, ok := Banks[p.Bank]; !ok {
		return fmt.Errorf("PCR bank %v; want SHA-256 or SHA-384", p.Bank)
	}
	if len(p.Values) == 0 {
		return errors.New("no PCRs")
	}
	for _, i := range p.indices() {
		switch v := p.Values[i]; {
		case i < 0 || i > 23:
			return fmt.Errorf("PCR %d does not exist", i)
		case resettable(i):
			return fmt.Errorf("PCR %d can be reset without a reboot", i)
		case len(v) != p.Bank.Size():
			return fmt.Errorf("PCR %d has a value of %d bytes, want %d", i, len(v), p.Bank.Size())
		case allZero(v):
			return fmt.Errorf("PCR %d is all zero: nothing was measured into it", i)
		}
	}
	return nil
}

func allZero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}

func (p PCR) list() string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(p.indices()), " ", ", "), "[]")
}

func (p PCR) indices() []int { return slices.Sorted(maps.Keys(p.Values)) }

// Selection returns the TPM's form of a bank and PCR indices.
func Selection(bank crypto.Hash, indices []int) tpm2.TPMLPCRSelection {
	u := make([]uint, len(indices))
	for i, x := range indices {
		u[i] = uint(x)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: Banks[bank], PCRSelect: tpm2.PCClientCompatible.PCRs(u...)}}}
}

// command is TPM2_PolicyPCR with the expected digest. The TPM answers TPM_RC_VALUE at once
// if its PCRs differ, which distinguishes a wrong boot state from every other refusal.
func (p PCR) command() (tpm2.PolicyPCR, error) {
	if err := p.Check(); err != nil {
		return tpm2.PolicyPCR{}, err
	}
	return p.demand(), nil
}

func (p PCR) demand() tpm2.PolicyPCR {
	h := crypto.SHA256.New() // the session's algorithm, whatever the bank's
	for _, i := range p.indices() {
		h.Write(p.Values[i])
	}
	return tpm2.PolicyPCR{
		PcrDigest: tpm2.TPM2BDigest{Buffer: h.Sum(nil)},
		Pcrs:      Selection(p.Bank, p.indices()),
	}
}

func (p PCR) extend(calc *tpm2.PolicyCalculator) error {
	cmd, err := p.command()
	if err != nil {
		return err
	}
	return cmd.Update(calc)
}

func (p PCR) satisfy(t transport.TPM, session tpm2.Session) error {
	cmd, err := p.command()
	if err != nil {
		return err
	}
	cmd.PolicySession = session.Handle()
	switch _, err := cmd.Execute(t); {
	case errors.Is(err, tpm2.TPMRCValue):
		return fmt.Errorf("TPM2_PolicyPCR: %w", ErrBootState)
	case err != nil:
		return fmt.Errorf("TPM2_PolicyPCR: %w", err)
	}
	return nil
}

// Epoch is the condition that the node's epoch counter is not above AtMost:
// TPM2_PolicyNV with an unsigned <=. A slot for the next epoch already satisfies it before
// the counter is incremented, so the slot can be saved first.
type Epoch struct {
	// Index is the counter's NV index.
	Index uint32
	// Name is the counter's Name as computed from code, never as read from a TPM or a
	// file. Another index with the counter's number then fails the condition.
	Name []byte
	// AtMost is the last counter value that satisfies the condition.
	AtMost uint64
}

func (e Epoch) command() tpm2.PolicyNV {
	index := tpm2.NamedHandle{Handle: tpm2.TPMHandle(e.Index), Name: tpm2.TPM2BName{Buffer: e.Name}}
	return tpm2.PolicyNV{
		AuthHandle: tpm2.AuthHandle{Handle: index.Handle, Name: index.Name, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    index,
		OperandB:   tpm2.TPM2BOperand{Buffer: binary.BigEndian.AppendUint64(nil, e.AtMost)},
		Operation:  tpm2.TPMEOUnsignedLE,
	}
}

func (e Epoch) extend(calc *tpm2.PolicyCalculator) error { return e.command().Update(calc) }

// notTheCounter are the response codes that PolicyNV returns only if the index is missing,
// was never written, or does not let everybody read 8 bytes of it.
var notTheCounter = []tpm2.TPMRC{
	tpm2.TPMRCHandle, tpm2.TPMRCNVUninitialized, tpm2.TPMRCNVAuthorization, tpm2.TPMRCNVLocked, tpm2.TPMRCNVRange,
	tpm2.TPMRCSize, tpm2.TPMRCAuthUnavailable, tpm2.TPMRCAuthType, tpm2.TPMRCBadAuth, tpm2.TPMRCAuthFail,
}

func (e Epoch) satisfy(t transport.TPM, session tpm2.Session) error {
	cmd := e.command()
	cmd.PolicySession = session.Handle()
	switch _, err := cmd.Execute(t); {
	case errors.Is(err, tpm2.TPMRCPolicy):
		return fmt.Errorf("TPM2_PolicyNV: %w", ErrEpoch)
	case slices.ContainsFunc(notTheCounter, func(rc tpm2.TPMRC) bool { return errors.Is(err, rc) }):
		return fmt.Errorf("TPM2_PolicyNV: %w: %w", ErrCounter, err)
	case err != nil:
		return fmt.Errorf("TPM2_PolicyNV: %w", err)
	}
	return nil
}
