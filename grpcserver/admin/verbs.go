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
	// Status reports the binding of each slot, and whether the slot would open.
	Status Verb[StatusRequest, StatusReport] = "status"
	// Rotate makes a new KEK the current one, and keeps the former one as retired.
	Rotate Verb[RotateRequest, KeyringState] = "rotate"
	// Reseal seals the KEK to the machine's present boot state.
	Reseal Verb[ResealRequest, KeyringState] = "reseal"
	// Suspend adds a slot that opens with weaker demands on the boot, for a few boots.
	Suspend Verb[SuspendRequest, KeyringState] = "suspend"
	// AddBootStates adds boot states that an operator's key signed.
	AddBootStates Verb[AddBootStatesRequest, KeyringState] = "add-boot-states"
	// RevokeBootStates revokes the boot states that a key signed.
	RevokeBootStates Verb[RevokeBootStatesRequest, KeyringState] = "revoke-boot-states"
	// AddSlot wraps the KEK with another wrapper.
	AddSlot Verb[AddSlotRequest, KeyringState] = "add-slot"
	// RemoveSlot removes a slot.
	RemoveSlot Verb[RemoveSlotRequest, KeyringState] = "remove-slot"
	// TestSlots opens slots and compares the results with the open KEK.
	TestSlots Verb[TestSlotsRequest, SlotTests] = "test-slots"
	// RewrapSlot wraps a slot again, with the newest version of its key.
	RewrapSlot Verb[RewrapSlotRequest, KeyringState] = "rewrap-slot"
	// ForgetCopies ends debts of revocation that the operator has taken care of.
	ForgetCopies Verb[ForgetCopiesRequest, KeyringState] = "forget-copies"
	// Recover opens the keyring with a recovery identity, seals again and rotates.
	Recover Verb[RecoverRequest, KeyringState] = "recover"
	// Restore replaces the stored keyring with another one, and rotates.
	Restore Verb[RestoreRequest, KeyringState] = "restore"
	// Save stores the open keyring again.
	Save Verb[SaveRequest, KeyringState] = "save"
	// Verify opens the stored keyring with a slot, and checks it against the anchor.
	Verify Verb[VerifyRequest, KeyringState] = "verify"
	// Prune removes a retired KEK.
	Prune Verb[PruneRequest, KeyringState] = "prune"
	// ArchiveKEK makes the archive of a retired KEK, or reads the archive of a removed
	// one.
	ArchiveKEK Verb[ArchiveRequest, ArchivedKEK] = "archive"
	// ImportArchive puts an archived KEK back as a retired one.
	ImportArchive Verb[ImportArchiveRequest, KeyringState] = "import-archive"
	// Reload reads the keyring again. Only a start reads the configuration.
	Reload Verb[ReloadRequest, KeyringState] = "reload"
)

// StatusRequest asks for a [StatusReport].
type StatusRequest struct {
	// Try says which slots are opened as a test, which takes the TPM some time.
	Try Try `json:"try,omitempty"`
}

// Try selects the slots that a status report opens.
type Try string

// The choices.
const (
	// TryNone looks only at memory and the stored keyring.
	TryNone Try = ""
	// TryTPM opens only the TPM's slots: a token counts wrong PINs, and a server may
	// need credentials that can be used only once.
	TryTPM Try = "tpm"
	// TryAll also opens the slots of tokens, servers and KMS plugins.
	TryAll Try = "all"
)

// State says whether a KEK is open.
type State string

// The states.
const (
	Open   State = "open"
	Locked State = "locked"
)

// StatusReport is the content of kleidi status. Times that do not apply are zero.
type StatusReport struct {
	// Version is the version of the running serve.
	Version string `json:"version"`
	Node    string `json:"node,omitempty"`
	State   State  `json:"state"`
	// Since is the time at which State began.
	Since time.Time `json:"since,omitzero"`
	// Problem is the reason why kleidi is locked.
	Problem *Problem `json:"problem,omitempty"`
	// NextAttempt is the time of the next attempt to unlock.
	NextAttempt  time.Time    `json:"nextAttempt,omitzero"`
	ClusterID    string       `json:"clusterID,omitempty"`
	CurrentKeyID seal.KeyID   `json:"currentKeyID,omitempty"`
	Revision     uint64       `json:"revision,omitempty"`
	Keys         []KeyReport  `json:"keys,omitempty"`
	Slots        []SlotReport `json:"slots,omitempty"`
	// Unrevoked are removed slots of which the TPM still opens kept copies, because that
	// TPM was absent when the slots were revoked.
	Unrevoked []Unrevoked `json:"unrevoked,omitempty"`
	// ChangedOutside are the differences between the slots and those that commands on this
	// node made or an operator confirmed.
	ChangedOutside []OutsideChange `json:"changedOutside,omitempty"`
	// Wrapper is the wrapper that opened the keyring. Fallback is the reason why the
	// wrappers before it in unlock.order did not.
	Wrapper  string   `json:"wrapper,omitempty"`
	Fallback *Problem `json:"fallback,omitempty"`
	// Staged is the reason why the staged KEK is not open, if there is a staged KEK and
	// serve runs.
	Staged *Problem `json:"staged,omitempty"`
	// Cluster is the node's knowledge of the cluster store, if there is one.
	Cluster *ClusterReport `json:"cluster,omitempty"`
	// Suspension is nil unless the node is suspended.
	Suspension *Suspension `json:"suspension,omitempty"`
	// Attestation is the result of the last attestation.
	Attestation *AttestationReport `json:"attestation,omitempty"`
	// Memory is the kind of memory that holds the KEK, see seal.Secret.Kind.
	Memory string `json:"memory,omitempty"`
	// TPMOpenTo names the users other than root that may use the TPM. With a copy of the
	// keyring, such a user gets the KEK.
	TPMOpenTo string `json:"tpmOpenTo,omitempty"`
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
	// Name is the type. If there are several slots of the type, the first digits of ID
	// follow: recovery-3f9a.
	Name string `json:"name"`
	// ID is a digest of the slot's binding. A rotation does not change it.
	ID   string `json:"id"`
	Type string `json:"type"`
	Node string `json:"node,omitempty"`
	// Binding describes in one line what the slot is sealed to.
	Binding string `json:"binding,omitempty"`
	// Use is the purpose of the slot: present, next, suspend or signed.
	Use string `json:"use,omitempty"`
	// Verifier says that the TPM opens the slot only with a remote verifier's signature.
	Verifier bool `json:"verifier,omitempty"`
	// Signer is the fingerprint of the key that may sign boot states for the slot.
	// Generation is the generation that it signs for; 0 means systemd's form, which has
	// no generation.
	Signer     string `json:"signer,omitempty"`
	Generation uint64 `json:"generation,omitempty"`
	// NotTried says that the slot was not tried because a try has a price: a token
	// counts wrong PINs, and a server's wrapped secret ID can be unwrapped only once.
	// So status without serve tries no such slot.
	NotTried bool `json:"notTried,omitempty"`
	// Opens is nil if the slot was not tried.
	Opens *bool `json:"opens,omitempty"`
	// Problem is the reason why the slot does not open.
	Problem *Problem `json:"problem,omitempty"`
	// SelfTest is the result of the last self-test of a token's or a server's slot since
	// serve started.
	SelfTest *SlotTest `json:"selfTest,omitempty"`
}

// Unrevoked is a former slot of which kept copies still open.
type Unrevoked struct {
	// EK is the digest of the endorsement key of the TPM that opens them.
	EK string `json:"ek"`
	// EpochIndex is the NV index of the TPM's counter, and UpToEpoch its last value under
	// which the copies open.
	EpochIndex uint32    `json:"epochIndex"`
	UpToEpoch  uint64    `json:"upToEpoch"`
	Since      time.Time `json:"since"`
	// Message says the same in words, and Hint says what to do.
	Message string `json:"message"`
	Hint    string `json:"hint"`
}

// OutsideChange is a way into the keyring that was added or removed, but not by a command on
// this node.
type OutsideChange struct {
	// Change is "added" or "removed".
	Change string `json:"change"`
	// Slot describes the boot state, the token's key or the recovery recipient.
	Slot string `json:"slot"`
	// ID is a digest of it.
	ID string `json:"id"`
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
	// SkipSlots names slots that the new KEK may lack for now.
	SkipSlots []string `json:"skipSlots,omitempty"`
	// AcceptDataLoss allows a new KEK without any recovery slot.
	AcceptDataLoss bool `json:"acceptDataLoss,omitempty"`
	// Confirmed are the IDs of the [OutsideChange]s that the operator was shown and
	// wants. An unconfirmed change refuses the rotation.
	Confirmed []string `json:"confirmed,omitempty"`
	// Replace is the key ID of the KEK to replace, so that a request can be repeated; ""
	// means the current one. Replace, Continue and Abort are for several nodes only.
	Replace seal.KeyID `json:"replace,omitempty"`
	// Continue makes this node drive the rotation that is going on.
	Continue bool `json:"continue,omitempty"`
	// Abort ends that rotation, and retires the staged KEK.
	Abort bool `json:"abort,omitempty"`
}

// ResealRequest asks to seal to the present boot state, and to revoke the slots of
// earlier boot states.
type ResealRequest struct {
	// Next, if set, asks to seal to this boot state in addition, and to revoke nothing.
	Next *BootState `json:"next,omitempty"`
	// DropNext asks to revoke slots for next boots as well.
	DropNext bool `json:"dropNext,omitempty"`
	// WithoutVerifier asks to seal without the configured verifier's demand.
	WithoutVerifier bool `json:"withoutVerifier,omitempty"`
	// NewTPM asks to seal a fresh KEK to a TPM to which no slot of the node is sealed.
	NewTPM bool `json:"newTPM,omitempty"`
	// BreakTwoOfTwo is as in [AddSlotRequest].
	BreakTwoOfTwo bool `json:"breakTwoOfTwo,omitempty"`
}

// BootState is a boot state that was predicted from the files of the next boot.
type BootState struct {
	// Bank is sha256 or sha384.
	Bank string `json:"bank"`
	// PCRs holds values by PCR.
	PCRs map[int][]byte `json:"pcrs"`
	// Record explains the values, see tpm.BootState.
	Record json.RawMessage `json:"record,omitempty"`
}

// SuspendRequest asks for a slot under a weaker authorization policy.
type SuspendRequest struct {
	// Boots is the number of boots that the suspension allows, at least 1.
	Boots int `json:"boots"`
	// Weaken names the PCRs to ignore; empty means all but PCR 7.
	Weaken []int `json:"weaken,omitempty"`
}

// AddBootStatesRequest carries boot states signed by one key for one generation.
type AddBootStatesRequest struct {
	// States is a file of signed boot states, see package tpm/bootstate.
	States []byte `json:"states"`
	// PublicKey is the signer's public key, in PEM.
	PublicKey []byte `json:"publicKey"`
}

// RevokeBootStatesRequest names the key whose slots are revoked.
type RevokeBootStatesRequest struct {
	// Key is the beginning of the key's fingerprint, in hexadecimal.
	Key string `json:"key"`
}

// AddSlotRequest asks for a slot of one wrapper.
type AddSlotRequest struct {
	// Type is pkcs11, vault, kms-plugin or recovery.
	Type string `json:"type"`
	// GenerateKey makes the token generate the key first.
	GenerateKey bool `json:"generateKey,omitempty"`
	// BreakTwoOfTwo says that the operator wants one wrapper alone to be enough.
	BreakTwoOfTwo bool `json:"breakTwoOfTwo,omitempty"`
	// Recipients are age public keys, for recovery.
	Recipients []string `json:"recipients,omitempty"`
}

// RemoveSlotRequest names a slot: by [SlotReport.Name], by its type and more digits of
// [SlotReport.ID], or by an age recipient.
type RemoveSlotRequest struct {
	Name string `json:"name"`
	// AcceptDataLoss allows the removal of the last recovery slot.
	AcceptDataLoss bool `json:"acceptDataLoss,omitempty"`
}

// TestSlotsRequest names slots as [RemoveSlotRequest] does. No name means every slot
// that can be tried.
type TestSlotsRequest struct {
	Names []string `json:"names,omitempty"`
}

// SlotTests are the results of opening slots.
type SlotTests struct {
	Slots []SlotTest `json:"slots"`
}

// SlotTest is the result of opening one slot.
type SlotTest struct {
	Name string `json:"name"`
	// Use is as in [SlotReport].
	Use string `json:"use,omitempty"`
	// Opens is false if the slot failed, for the reason in Problem, or if ForNextBoot is
	// true: then the slot is for a prepared boot, and nothing is wrong with it.
	Opens       bool          `json:"opens"`
	ForNextBoot bool          `json:"forNextBoot,omitempty"`
	Problem     *Problem      `json:"problem,omitempty"`
	Warnings    []string      `json:"warnings,omitempty"`
	Duration    time.Duration `json:"duration"`
}

// RewrapSlotRequest names a slot as [RemoveSlotRequest] does.
type RewrapSlotRequest struct {
	Name string `json:"name"`
	// NewKey trusts the configured key although it does not open the slot.
	NewKey bool `json:"newKey,omitempty"`
}

// ForgetCopiesRequest names the TPM of which [StatusReport.Unrevoked] says that it still
// opens kept copies, by its [Unrevoked.EK].
type ForgetCopiesRequest struct {
	EK string `json:"ek"`
}

// RecoverRequest carries the recovery identity to the running serve.
type RecoverRequest struct {
	Identity Identity `json:"identity"`
	// TrustKeyID is the current key ID of the keyring that the operator vouches for, if
	// the anchor can't.
	TrustKeyID seal.KeyID `json:"trustKeyID,omitempty"`
	// WithoutVerifier asks to seal without the configured verifier's demand.
	WithoutVerifier bool `json:"withoutVerifier,omitempty"`
	// BreakTwoOfTwo is as in [AddSlotRequest].
	BreakTwoOfTwo bool `json:"breakTwoOfTwo,omitempty"`
}

// Wipe clears the identity. [Handle] calls it when the handler has returned.
func (r *RecoverRequest) Wipe() { clear(r.Identity) }

// RestoreRequest carries a keyring that replaces the stored one.
type RestoreRequest struct {
	Keyring []byte `json:"keyring"`
	// Identity opens the keyring if the TPM does not. If empty, the TPM must open it.
	Identity Identity `json:"identity,omitempty"`
	// TrustKeyID is as in [RecoverRequest].
	TrustKeyID seal.KeyID `json:"trustKeyID,omitempty"`
	// BreakTwoOfTwo is as in [AddSlotRequest].
	BreakTwoOfTwo bool `json:"breakTwoOfTwo,omitempty"`
	// SkipSlots is as in [RotateRequest], for slots of the given keyring.
	SkipSlots []string `json:"skipSlots,omitempty"`
	// AcceptDataLoss is as in [RotateRequest].
	AcceptDataLoss bool `json:"acceptDataLoss,omitempty"`
}

// Wipe clears the identity. [Handle] calls it when the handler has returned.
func (r *RestoreRequest) Wipe() { clear(r.Identity) }

// SaveRequest asks to replace the stored keyring with the open one.
type SaveRequest struct{}

// VerifyRequest asks to check the stored keyring.
type VerifyRequest struct{}

// PruneRequest asks to remove a retired KEK under which nothing is stored.
type PruneRequest struct {
	KeyID seal.KeyID `json:"keyID"`
	// Archive is the archive of the KEK as it was read back.
	Archive []byte `json:"archive,omitempty"`
	// Records are the records of the other nodes, if no cluster store holds them.
	Records [][]byte `json:"records,omitempty"`
	// Check asks only whether the KEK could be removed. An object that is stored after a
	// successful check is not encrypted under that KEK, so the check comes before the
	// last look at etcd.
	Check bool `json:"check,omitempty"`
}

// ArchiveRequest asks for the archive of a retired KEK, or for the archive of a removed
// KEK from the cluster store.
type ArchiveRequest struct {
	KeyID seal.KeyID `json:"keyID"`
	// ForPrune asks first whether the KEK could be removed. Records are as in [PruneRequest].
	ForPrune bool     `json:"forPrune,omitempty"`
	Records  [][]byte `json:"records,omitempty"`
}

// ArchivedKEK is the archive of a KEK, for the recovery recipients.
type ArchivedKEK struct {
	KeyID   seal.KeyID `json:"keyID"`
	Archive []byte     `json:"archive"`
	// Recipients are the age recipients that can open the archive.
	Recipients []string `json:"recipients"`
}

// ImportArchiveRequest asks to put an archived KEK back as a retired one.
type ImportArchiveRequest struct {
	// Archive is the archive. If it is empty, KeyID names one in the cluster store.
	Archive []byte     `json:"archive,omitempty"`
	KeyID   seal.KeyID `json:"keyID,omitempty"`
	// Identity opens the archive.
	Identity Identity `json:"identity"`
	// TrustKeyID is the key ID of the archived KEK. With it the operator vouches that the
	// cluster used that KEK, if the keyring can't tell who made the archive.
	TrustKeyID seal.KeyID `json:"trustKeyID,omitempty"`
}

// Wipe clears the identity. [Handle] calls it when the handler has returned.
func (r *ImportArchiveRequest) Wipe() { clear(r.Identity) }

// ReloadRequest asks to read the keyring again.
type ReloadRequest struct{}

// KeyringState is the state of the keyring after a verb.
type KeyringState struct {
	CurrentKeyID seal.KeyID `json:"currentKeyID"`
	Revision     uint64     `json:"revision"`
	// Former is the key ID that was current before, if it changed.
	Former seal.KeyID `json:"former,omitempty"`
	// Changes list what was done, one line each.
	Changes []string `json:"changes,omitempty"`
	// Owed says that a slot was to be revoked, and that copies of it still open.
	Owed bool `json:"owed,omitempty"`
	// Rotation says how far a rotation of several nodes is.
	Rotation *Rotation `json:"rotation,omitempty"`
}

// Identity is the text of an age identity file. It refuses to be printed or logged. In
// JSON it is base64, and only on this socket.
type Identity []byte

const redacted = "[identity]"

// String implements fmt.Stringer.
func (Identity) String() string { return redacted }

// GoString implements fmt.GoStringer.
func (Identity) GoString() string { return redacted }

// LogValue implements slog.LogValuer.
func (Identity) LogValue() slog.Value { return slog.StringValue(redacted) }

// ProblemOf splits err into its parts; nil gives nil.
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

// detailed is an error that consists of one sentence and a list. Its text contains
// both, in the form that Err gives them.
type detailed interface {
	error
	Headline() string
	Details() []string
}

// listed is a problem with details as an error, which [ProblemOf] takes apart again.
type listed struct{ p *Problem }

func (l *listed) Error() string     { return l.p.Message + ": " + strings.Join(l.p.Details, "; ") }
func (l *listed) Headline() string  { return l.p.Message }
func (l *listed) Details() []string { return l.p.Details }

// Err joins the parts again: into a [*seal.Error] if the problem came from one.
func (p *Problem) Err() error {
	if p == nil {
		return nil
	}
	err := errors.New(p.Message)
	if len(p.Details) > 0 {
		err = &listed{p}
	}
	if p.Cause == "" && p.Hint == "" {
		return err
	}
	return &seal.Error{Cause: p.Cause, Err: err, Hint: p.Hint}
}

// Suspension describes the suspension of a node.
type Suspension struct {
	// Binding describes what a boot must share with the suspended one, for display.
	Binding string `json:"binding"`
	// BootsLeft is the number of further boots in which the TPM opens the slot; nil if
	// the TPM was not asked, or did not answer.
	BootsLeft *int64 `json:"bootsLeft,omitempty"`
}

// String describes the suspension in one sentence, and how to end it.
func (s *Suspension) String() string {
	text := "anyone who boots this machine with the same " + s.Binding + " gets the KEK; run kleidi reseal to end this"
	if s.BootsLeft != nil {
		text += fmt.Sprintf(" (boots left: %d)", *s.BootsLeft)
	}
	return text
}

// WatchRotation reports the progress of a rotation of several nodes.
const WatchRotation Verb[WatchRotationRequest, KeyringState] = "watch-rotation"

// WatchRotationRequest asks for a [KeyringState] with its Rotation.
type WatchRotationRequest struct{}
