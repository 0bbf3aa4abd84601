package authpolicy

import (
	"crypto"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

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

// ErrBootState says that PCR values differ from those in the authorization policy.
var ErrBootState = errors.New("PCR values are not the authorised ones")

const bootProgram = 4

const secureBootKeys = 7
