package attest

import (
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// hintReboot is for a machine whose TPM was not reset at its last start, or was reset
// without a start.
const hintReboot = "reboot fully"

// refuse turns an error of this machine's evidence into a refusal with a remedy.
func refuse(err error) error {
	r := RemedyOf(err)
	return &seal.Error{Cause: r.Cause, Hint: r.Hint("tpm.pcrs"), Permanent: r.Permanent, Err: fmt.Errorf("attestation: %w", err)}
}

// Remedy is the remedy for evidence that does not verify.
type Remedy struct {
	Cause seal.Cause
	// Permanent is as in [seal.Error].
	Permanent bool

	hint string
	// unlogged says that a PCR may have been extended without an event in the log.
	unlogged bool
}

// Hint says what to do next. setting names the setting in which an operator can leave
// out an unreliable PCR.
func (r Remedy) Hint(setting string) string {
	if r.unlogged {
		return "if a component extended a PCR without logging it, leave that PCR out with " + setting + "; else the log was tampered with"
	}
	return r.hint
}

// RemedyOf returns the remedy for an error of [Verify], [VerifyLogs] or [Logs.Read].
// Only for a log that does not lead to the quoted values does the remedy speak of
// tampering.
func RemedyOf(err error) Remedy {
	r := Remedy{Cause: seal.CauseAttestation, Permanent: true}
	var bank *eventlog.BankError
	var incomplete *eventlog.IncompleteError
	var mismatch *eventlog.MismatchError
	var other *disagreement
	var quote *quoteError
	var userspace *userspaceError
	switch {
	case errors.Is(err, eventlog.ErrEmptyLog):
		r.hint = "the firmware or the hypervisor hands Linux no events, as Azure's Trusted Launch: this machine can't be attested; open the keyring with another wrapper (unlock.order), see docs/boot-states.md"
	case errors.Is(err, eventlog.ErrSHA1Log):
		r.hint = "set the firmware's TPM to 2.0 with a SHA-256 bank"
	case errors.As(err, &bank):
		r.Cause, r.hint = seal.CauseConfiguration, keys.BankHint(bank.Bank, bank.Has)
	case errors.As(err, &incomplete):
		r.Cause, r.hint = seal.CauseConfiguration, "what measured this event left that bank out: set tpm.bank to one that every event has, or update the firmware"
	case errors.As(err, &mismatch) && mismatch.TPMIsBehind():
		r.hint = "a machine that resumed from hibernation is in this state: " + hintReboot + "; else the log was tampered with"
	case errors.As(err, &mismatch):
		r.unlogged, r.Permanent = true, false
	case errors.As(err, &other):
		r.hint = "two parsers read this log in two ways, so it proves nothing: update the firmware, and report it with a copy of the log"
	case errors.As(err, &quote):
		r.hint, r.Permanent = "the TPM's answer does not verify: try again; if it stays so, the TPM or what stands before it is faulty", false
	case errors.As(err, &userspace):
		r.hint, r.Permanent = "systemd's log breaks the rules of its format: see tpm.userspaceEventLog, and restart the machine", false
	default:
		r.hint, r.Permanent = "the log breaks the rules of its format: update the firmware, and report it with a copy of the log", false
	}
	return r
}
