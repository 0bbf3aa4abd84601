package admin

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// Verb names an operation and carries the types of its request and response.
type Verb[Req, Resp any] string

// The verbs.
const (
	// Status reports what is sealed to what, and whether it would open.
	Status Verb[StatusRequest, StatusReport] = "status"
	// Rotate makes a new KEK the current one; the former is kept, retired.
	Rotate Verb[RotateRequest, KeyringState] = "rotate"
	// Reseal seals the KEK to the machine's boot state of now.
	Reseal Verb[ResealRequest, KeyringState] = "reseal"
	// Suspend adds a slot that opens whatever boots, for a few boots.
	Suspend Verb[SuspendRequest, KeyringState] = "suspend"
	// AddBootStates adds boot states that an operator's key signed.
	AddBootStates Verb[AddBootStatesRequest, KeyringState] = "add-boot-states"
	// RevokeBootStates takes away what a key signed.
	RevokeBootStates Verb[RevokeBootStatesRequest, KeyringState] = "revoke-boot-states"
	// AddSlot wraps the KEK by one wrapper more.
	AddSlot Verb[AddSlotRequest, KeyringState] = "add-slot"
	// RemoveSlot takes a slot away.
	RemoveSlot Verb[RemoveSlotRequest, KeyringState] = "remove-slot"
	// TestSlots opens slots and compares what comes out.
	TestSlots Verb[TestSlotsRequest, SlotTests] = "test-slots"
	// RewrapSlot wraps a slot again, by the newest version of its key.
	RewrapSlot Verb[RewrapSlotRequest, KeyringState] = "rewrap-slot"
	// Recover opens the keyring with a recovery identity, seals again and rotates.
	Recover Verb[RecoverRequest, KeyringState] = "recover"
	// Restore puts another keyring in the place of the stored one, and rotates.
	Restore Verb[RestoreRequest, KeyringState] = "restore"
	// Save stores the open keyring again.
	Save Verb[SaveRequest, KeyringState] = "save"
	// Verify opens the stored keyring with a slot, and checks it against the anchor.
	Verify Verb[VerifyRequest, KeyringState] = "verify"
	// Reload reads the keyring again; the configuration is read at start only.
	Reload Verb[ReloadRequest, KeyringState] = "reload"
)

// StatusRequest asks for a [StatusReport].
type StatusRequest struct {
	// Try says which slots are opened to see whether they would, which takes the TPM
	// some time.
	Try Try `json:"try,omitempty"`
}

// Try is which slots a status report opens.
type Try string

// The choices.
const (
	// TryNone looks at memory and the stored keyring alone.
	TryNone Try = ""
	// TryTPM opens the slots of the TPM alone: a token counts wrong PINs, and a server
	// wants credentials that may be of one use.
	TryTPM Try = "tpm"
	// TryAll opens those of tokens and servers as well.
	TryAll Try = "all"
)

// State says whether a KEK is open.
type State string

// The states.
const (
	Open   State = "open"
	Locked State = "locked"
)

// StatusReport is everything that status shows. Times are zero where they do not apply.
type StatusReport struct {
	// Version is that of the running serve.
	Version string `json:"version"`
	Node    string `json:"node,omitempty"`
	State   State  `json:"state"`
	// Since is when State was entered.
	Since time.Time `json:"since,omitzero"`
	// Problem is why it is locked.
	Problem *Problem `json:"problem,omitempty"`
	// NextAttempt is when unlocking is tried again.
	NextAttempt  time.Time    `json:"nextAttempt,omitzero"`
	ClusterID    string       `json:"clusterID,omitempty"`
	CurrentKeyID seal.KeyID   `json:"currentKeyID,omitempty"`
	Revision     uint64       `json:"revision,omitempty"`
	Keys         []KeyReport  `json:"keys,omitempty"`
	Slots        []SlotReport `json:"slots,omitempty"`
	// Wrapper is which wrapper opened the keyring, and Fallback why those before it
	// in unlock.order did not.
	Wrapper  string   `json:"wrapper,omitempty"`
	Fallback *Problem `json:"fallback,omitempty"`
	// Staged is why the staged KEK is not open, where one is staged and serve runs.
	Staged *Problem `json:"staged,omitempty"`
	// Suspension is nil unless the node is suspended.
	Suspension *Suspension `json:"suspension,omitempty"`
	// Attestation is the result of the last one.
	Attestation *AttestationReport `json:"attestation,omitempty"`
	// Memory is the kind of memory that holds the KEK, as seal.Secret.Kind says.
	Memory string `json:"memory,omitempty"`
}

// Problem is an error in parts.
type Problem struct {
	Cause   seal.Cause `json:"cause,omitempty"`
	Message string     `json:"message"`
	// Details are what the message announces, such as each PCR that differs.
	Details []string `json:"details,omitempty"`
	Hint    string   `json:"hint,omitempty"`
}

// KeyReport is one KEK of the keyring.
type KeyReport struct {
	KeyID seal.KeyID `json:"keyID"`
	// Role is "current", "staged" or "retired".
	Role    string    `json:"role"`
	Created time.Time `json:"created,omitzero"`
	Retired time.Time `json:"retired,omitzero"`
}

// SlotReport is one slot of the current KEK.
type SlotReport struct {
	// Name is the type; where there are several of it, followed by the first digits of ID:
	// recovery-3f9a.
	Name string `json:"name"`
	// ID is a digest of what the slot is bound to. It outlives a rotation.
	ID   string `json:"id"`
	Type string `json:"type"`
	Node string `json:"node,omitempty"`
	// Binding says in one line what the slot is sealed to.
	Binding string `json:"binding,omitempty"`
	// Use is what the slot is for: present, next, suspend or signed.
	Use string `json:"use,omitempty"`
	// Signer is the fingerprint of the key that may sign boot states for it, and
	// Generation what it signs for; 0 is systemd's form, which has none.
	Signer     string `json:"signer,omitempty"`
	Generation uint64 `json:"generation,omitempty"`
	// NotTried says that a try would cost one: a token counts wrong PINs, a server's
	// wrapped secret ID can be unwrapped once. So status without serve tries none.
	NotTried bool `json:"notTried,omitempty"`
	// Opens is nil where it was not tried.
	Opens *bool `json:"opens,omitempty"`
	// Problem is why it does not open.
	Problem *Problem `json:"problem,omitempty"`
}

// AttestationReport is the result of an attestation.
type AttestationReport struct {
	Passed bool      `json:"passed"`
	Time   time.Time `json:"time,omitzero"`
	// Boot is the way in which the machine booted.
	Boot    string   `json:"boot,omitempty"`
	Bank    string   `json:"bank,omitempty"`
	PCRs    []int    `json:"pcrs,omitempty"`
	Problem *Problem `json:"problem,omitempty"`
}

// RotateRequest asks for a new current KEK.
type RotateRequest struct {
	// SkipSlots names slots that the new KEK does without for now.
	SkipSlots []string `json:"skipSlots,omitempty"`
	// AcceptDataLoss says that the new KEK may do without any recovery slot.
	AcceptDataLoss bool `json:"acceptDataLoss,omitempty"`
}

// ResealRequest asks to seal to the boot state of now; slots of earlier boot
// states are revoked.
type ResealRequest struct {
	// Next, if set, asks to seal to this boot state too, and to revoke nothing.
	Next *BootState `json:"next,omitempty"`
	// DropNext asks to revoke slots for next boots as well.
	DropNext bool `json:"dropNext,omitempty"`
	// WithoutVerifier asks to seal without the configured verifier's demand.
	WithoutVerifier bool `json:"withoutVerifier,omitempty"`
	// NewTPM asks to seal a fresh KEK to a TPM that no slot of the node is sealed to.
	NewTPM bool `json:"newTPM,omitempty"`
	// BreakTwoOfTwo is as in [AddSlotRequest].
	BreakTwoOfTwo bool `json:"breakTwoOfTwo,omitempty"`
}

// BootState is a way to boot that was computed from the files of the next boot.
type BootState struct {
	// Bank is sha256 or sha384.
	Bank string `json:"bank"`
	// PCRs holds values by PCR.
	PCRs map[int][]byte `json:"pcrs"`
	// Record is what explains the values, see tpm.BootState.
	Record json.RawMessage `json:"record,omitempty"`
}

// SuspendRequest asks for a slot under a weaker authorization policy.
type SuspendRequest struct {
	// Boots is how often the machine may start with it, at least 1.
	Boots int `json:"boots"`
	// Weaken names the PCRs to let go; empty means all but PCR 7.
	Weaken []int `json:"weaken,omitempty"`
}

// AddBootStatesRequest carries signed boot states of one key and one generation.
type AddBootStatesRequest struct {
	// States is a file of signed boot states, see package tpm/bootstate.
	States []byte `json:"states"`
	// PublicKey is the signer's public key, in PEM.
	PublicKey []byte `json:"publicKey"`
}

// RevokeBootStatesRequest names the key whose slots go.
type RevokeBootStatesRequest struct {
	// Key is the beginning of the key's fingerprint, in hexadecimal.
	Key string `json:"key"`
}

// AddSlotRequest asks for a slot by one wrapper.
type AddSlotRequest struct {
	// Type is pkcs11, vault or recovery.
	Type string `json:"type"`
	// GenerateKey has the token make the key first.
	GenerateKey bool `json:"generateKey,omitempty"`
	// BreakTwoOfTwo says that the operator wants one wrapper to be enough.
	BreakTwoOfTwo bool `json:"breakTwoOfTwo,omitempty"`
	// Recipients are age public keys, for recovery.
	Recipients []string `json:"recipients,omitempty"`
}

// RemoveSlotRequest names a slot: by [SlotReport.Name], by its type and more digits of
// [SlotReport.ID], or by an age recipient.
type RemoveSlotRequest struct {
	Name string `json:"name"`
	// AcceptDataLoss says that the last recovery slot may go.
	AcceptDataLoss bool `json:"acceptDataLoss,omitempty"`
}

// TestSlotsRequest names slots as [RemoveSlotRequest] does; none means every slot that can be tried.
type TestSlotsRequest struct {
	Names []string `json:"names,omitempty"`
}

// SlotTests is what came of opening slots.
type SlotTests struct {
	Slots []SlotTest `json:"slots"`
}

// SlotTest is what came of opening one slot.
type SlotTest struct {
	Name string `json:"name"`
	// Use is as in [SlotReport].
	Use string `json:"use,omitempty"`
	// Opens is false where Problem says why, and where ForNextBoot is true: the slot
	// is for a boot that was prepared, and nothing is wrong with it.
	Opens       bool          `json:"opens"`
	ForNextBoot bool          `json:"forNextBoot,omitempty"`
	Problem     *Problem      `json:"problem,omitempty"`
	Warnings    []string      `json:"warnings,omitempty"`
	Duration    time.Duration `json:"duration"`
}

// RewrapSlotRequest names a slot as [RemoveSlotRequest] does.
type RewrapSlotRequest struct {
	Name string `json:"name"`
	// NewKey trusts the key that is configured, although it does not open the slot.
	NewKey bool `json:"newKey,omitempty"`
}

// RecoverRequest carries the recovery identity to the serve that holds the TPM.
type RecoverRequest struct {
	Identity Identity `json:"identity"`
	// TrustKeyID is the current key ID of the keyring that the operator vouches
	// for, where the anchor can't.
	TrustKeyID seal.KeyID `json:"trustKeyID,omitempty"`
	// WithoutVerifier asks to seal without the configured verifier's demand.
	WithoutVerifier bool `json:"withoutVerifier,omitempty"`
	// BreakTwoOfTwo is as in [AddSlotRequest].
	BreakTwoOfTwo bool `json:"breakTwoOfTwo,omitempty"`
}

// Wipe clears the identity. [Handle] calls it when the handler has returned.
func (r *RecoverRequest) Wipe() { clear(r.Identity) }

// RestoreRequest carries a keyring to put in the place of the stored one.
type RestoreRequest struct {
	Keyring []byte `json:"keyring"`
	// Identity opens it where the TPM does not; empty means with the TPM.
	Identity Identity `json:"identity,omitempty"`
	// TrustKeyID is as in [RecoverRequest].
	TrustKeyID seal.KeyID `json:"trustKeyID,omitempty"`
	// BreakTwoOfTwo is as in [AddSlotRequest].
	BreakTwoOfTwo bool `json:"breakTwoOfTwo,omitempty"`
	// SkipSlots is as in [RotateRequest], of the given keyring.
	SkipSlots []string `json:"skipSlots,omitempty"`
	// AcceptDataLoss is as in [RotateRequest].
	AcceptDataLoss bool `json:"acceptDataLoss,omitempty"`
}

// Wipe clears the identity. [Handle] calls it when the handler has returned.
func (r *RestoreRequest) Wipe() { clear(r.Identity) }

// SaveRequest asks to store the open keyring in the place of what is stored.
type SaveRequest struct{}

// VerifyRequest asks to check the stored keyring.
type VerifyRequest struct{}

// ReloadRequest asks to read the keyring again.
type ReloadRequest struct{}

// KeyringState is what the verbs that touch the keyring leave behind.
type KeyringState struct {
	CurrentKeyID seal.KeyID `json:"currentKeyID"`
	Revision     uint64     `json:"revision"`
	// Former is the key ID that was current before, if it is another one.
	Former seal.KeyID `json:"former,omitempty"`
	// Changes say, one line each, what was done.
	Changes []string `json:"changes,omitempty"`
}

// Identity is an age identity file's text. It refuses to be printed or logged; in JSON it is
// base64, on this socket alone.
type Identity []byte

const redacted = "[identity]"

// String implements fmt.Stringer.
func (Identity) String() string { return redacted }

// GoString implements fmt.GoStringer.
func (Identity) GoString() string { return redacted }

// LogValue implements slog.LogValuer.
func (Identity) LogValue() slog.Value { return slog.StringValue(redacted) }

// ProblemOf takes err apart; nil gives nil.
func ProblemOf(err error) *Problem {
	if err == nil {
		return nil
	}
	message, hint := seal.SplitHint(err)
	p := &Problem{Cause: seal.CauseOf(err), Message: message, Hint: hint}
	var d detailed
	if errors.As(err, &d) {
		if before, ok := strings.CutSuffix(message, d.Error()); ok {
			p.Message, p.Details = before+d.Headline(), d.Details()
		}
	}
	return p
}

// detailed is an error that consists of one sentence and what it lists. Its text is both,
// as Err puts them together.
type detailed interface {
	error
	Headline() string
	Details() []string
}

// text returns message and details in one line.
func (p *Problem) text() string {
	if len(p.Details) == 0 {
		return p.Message
	}
	return p.Message + ": " + strings.Join(p.Details, "; ")
}

// Err puts the parts together: a [*seal.Error] where there was one.
func (p *Problem) Err() error {
	if p == nil {
		return nil
	}
	if p.Cause == "" && p.Hint == "" {
		return errors.New(p.text())
	}
	return &seal.Error{Cause: p.Cause, Err: errors.New(p.text()), Hint: p.Hint}
}

// Suspension is what opens a suspended node's keyring.
type Suspension struct {
	// Binding is what a boot must share, for people.
	Binding string `json:"binding"`
	// BootsLeft is how many boots more the TPM lets it open; nil if it was not asked, or
	// did not say.
	BootsLeft *int64 `json:"bootsLeft,omitempty"`
}

// String is the suspension in one sentence, with what ends it.
func (s *Suspension) String() string {
	text := "anyone who boots this machine with the same " + s.Binding + " gets the KEK; run kleidi reseal to end this"
	if s.BootsLeft != nil {
		text += fmt.Sprintf(" (boots left: %d)", *s.BootsLeft)
	}
	return text
}
