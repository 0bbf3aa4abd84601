package seal

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
)

// ErrNotMine says that a slot belongs to another wrapper, node or identity. It is
// not a failure: the caller tries the next slot.
var ErrNotMine = errors.New("not this wrapper's slot")

// Cause says why a KEK is not open. Two causes differ if their remedies differ. The
// text of a Cause is its name in logs, metrics and JSON.
type Cause string

// The causes.
const (
	// CauseBootState: the machine did not boot as the slot's authorization
	// policy demands.
	CauseBootState Cause = "boot-state-not-authorized"
	// CauseEpoch: the slot was sealed for an epoch that has passed, so it is revoked.
	CauseEpoch Cause = "epoch-passed"
	// CauseAttestation: the evidence could not be gathered, or did not verify.
	CauseAttestation Cause = "attestation-failed"
	// CauseBootPolicy: the evidence verified, and the boot policy refuses the boot.
	CauseBootPolicy Cause = "boot-policy-refused"
	// CauseLockout: the TPM's dictionary-attack protection is in lockout.
	CauseLockout Cause = "tpm-locked-out"
	// CauseOtherTPM: the slot was sealed by another TPM.
	CauseOtherTPM Cause = "other-tpm"
	// CauseTPMCleared: this is the node's TPM, but its owner hierarchy was
	// cleared after the slot was sealed.
	CauseTPMCleared Cause = "tpm-cleared"
	// CauseUnavailable: the backend (TPM, token, server) cannot be reached, or
	// did not answer in time or sensibly.
	CauseUnavailable Cause = "backend-unavailable"
	// CauseConfiguration: the configuration asks for something that the machine does
	// not have. Waiting does not help.
	CauseConfiguration Cause = "configuration-wrong"
	// CauseKeyMissing: the backend answers and does not have the wrapping key. Waiting
	// does not help.
	CauseKeyMissing Cause = "key-missing"
	// CauseCredentials: the backend refused our credentials.
	CauseCredentials Cause = "credentials-refused"
	// CauseSlotCorrupt: the slot does not parse or contradicts itself.
	CauseSlotCorrupt Cause = "slot-corrupt"
	// CauseKeyringMissing: there is no keyring yet.
	CauseKeyringMissing Cause = "keyring-missing"
	// CauseKeyringCorrupt: the keyring does not parse, or its MAC does not verify.
	CauseKeyringCorrupt Cause = "keyring-corrupt"
	// CauseAnchor: the keyring contradicts the anchor, which names the keyring that this
	// node last trusted.
	CauseAnchor Cause = "anchor-mismatch"
	// CauseNoSlot: the keyring holds no slot that a configured wrapper can open.
	CauseNoSlot Cause = "no-slot"
	// CauseMemory: the kernel locked no memory for the KEK.
	CauseMemory Cause = "memory-not-lockable"
	// CauseStore: the keyring or the anchor could not be read or saved.
	CauseStore Cause = "store-failed"
	// CauseNodeRemoved: the shared keyring no longer lists this node.
	CauseNodeRemoved Cause = "node-removed"
	// CauseForked: two shared keyrings of one cluster exist, and neither follows the
	// other.
	CauseForked Cause = "forked"
	// CauseStarting: the first attempt to unlock has not ended yet.
	CauseStarting Cause = "starting"
)

// Causes lists all causes.
func Causes() []Cause {
	return []Cause{
		CauseBootState, CauseEpoch, CauseAttestation, CauseBootPolicy, CauseLockout, CauseOtherTPM, CauseTPMCleared, CauseUnavailable, CauseConfiguration, CauseKeyMissing, CauseCredentials,
		CauseSlotCorrupt, CauseKeyringMissing, CauseKeyringCorrupt, CauseAnchor, CauseNoSlot, CauseMemory, CauseStore, CauseNodeRemoved, CauseForked, CauseStarting,
	}
}

// Error is a failure with its cause and its remedy.
type Error struct {
	Cause Cause
	// Err says what happened, in lower case and without a full stop.
	Err error
	// Hint tells the operator what to do next.
	Hint string
	// NoRecovery is the hint to show in place of Hint if the keyring has no recovery slot
	// and Hint advises the recovery identity; see [Error.OrRecover] and
	// [WithoutRecovery].
	NoRecovery string
	// Permanent says that a further attempt fails too, until somebody changes the
	// configuration or restarts the machine.
	Permanent bool
}

// Error returns what happened, followed by the hint.
func (e *Error) Error() string {
	if e.Hint == "" {
		return e.Err.Error()
	}
	return e.Err.Error() + "; " + e.Hint
}

// Unwrap returns Err.
func (e *Error) Unwrap() error { return e.Err }

// Errorf returns an [*Error] whose Err is formatted as by fmt.Errorf.
func Errorf(cause Cause, hint, format string, args ...any) *Error {
	return &Error{Cause: cause, Hint: hint, Err: fmt.Errorf(format, args...)}
}

// OrRecover adds to the hint of e that the recovery identity opens the keyring as well, and
// returns e.
func (e *Error) OrRecover() *Error {
	const recover = "run kleidi recover with the recovery identity"
	if e.Hint == "" {
		e.Hint, e.NoRecovery = recover, hintNoRecovery
		return e
	}
	e.Hint, e.NoRecovery = e.Hint+", or "+recover, e.Hint
	return e
}

const hintNoRecovery = "the keyring has no recovery slot; if a backup has one, run kleidi keyring restore BACKUP --identity-file FILE"

// WithoutRecovery returns err with a hint that names no recovery identity. It is for errors
// of a keyring that has no recovery slot.
func WithoutRecovery(err error) error {
	e, ok := errors.AsType[*Error](err)
	if !ok || e.NoRecovery == "" {
		return err
	}
	return WithHint(err, e.NoRecovery)
}

// CauseOf returns the cause of the outermost [*Error] in err's chain, or "" if the
// chain has none.
func CauseOf(err error) Cause {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Cause
	}
	return ""
}

// IsPermanent reports whether any [*Error] in err's chain is permanent.
func IsPermanent(err error) bool {
	for e, ok := errors.AsType[*Error](err); ok; e, ok = errors.AsType[*Error](e.Err) {
		if e.Permanent {
			return true
		}
	}
	return false
}

// SplitHint splits err's text into the message and the hint of the outermost
// [*Error] in err's chain. The hint is "" if the chain has no [*Error], or if that
// [*Error] has no hint.
func SplitHint(err error) (message, hint string) {
	message = err.Error()
	e, ok := errors.AsType[*Error](err)
	if !ok || e.Hint == "" {
		return message, ""
	}
	return strings.TrimSuffix(message, "; "+e.Hint), e.Hint
}

// Caused returns err with a cause, and with what before its text. If err has a hint, that
// hint stays; otherwise the result gets the given hint.
func Caused(cause Cause, hint, what string, err error) *Error {
	message, own := SplitHint(err)
	if own != "" {
		hint = own
	}
	return &Error{Cause: cause, Hint: hint, Err: fmt.Errorf("%s: %w", what, &reworded{message, err})}
}

// AddHint returns err with one more thing to do next, after its present hint.
func AddHint(err error, hint string) *Error {
	_, former := SplitHint(err)
	if former == "" {
		return WithHint(err, hint)
	}
	added := WithHint(err, former+"; "+hint)
	if e, ok := errors.AsType[*Error](err); ok && e.NoRecovery != "" {
		added.NoRecovery = e.NoRecovery + "; " + hint
	}
	return added
}

// WithHint returns err with this hint in place of its own. Its cause stays, and so
// do the errors in its chain.
func WithHint(err error, hint string) *Error {
	message, _ := SplitHint(err)
	return &Error{Cause: CauseOf(err), Hint: hint, Err: &reworded{message, err}}
}

// reworded is an error whose text leaves out the hint.
type reworded struct {
	text string
	err  error
}

func (r *reworded) Error() string { return r.text }
func (r *reworded) Unwrap() error { return r.err }

// Errors of the DEK seed operations. They hold neither key material nor input.
var (
	// ErrUnknownKey: no KEK with that key ID is in the keyring.
	ErrUnknownKey = errors.New("unknown key ID")
	// ErrMalformed: the input does not have the form that kleidi writes or accepts.
	ErrMalformed = errors.New("malformed input")
	// ErrAuthentication: the ciphertext does not authenticate under the named KEK.
	ErrAuthentication = errors.New("ciphertext does not authenticate")
)

// OneLine returns s as at most limit printable runes. It cuts a longer s and
// replaces runes that can't be printed, because messages quote event logs and
// names that come from peers.
func OneLine(s string, limit int) string {
	n := 0
	for i := range s { // i is the index of a rune's first byte
		if n == limit {
			s = s[:i] + "…"
			break
		}
		n++
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}
