package slotview

import (
	"context"
	"encoding/json"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// Missing is the data of a placeholder for a missing slot. Nothing opens it.
type Missing struct {
	Type  string    `json:"type"`
	Since time.Time `json:"since,omitzero"` // when a slot was left out; zero if there never was one
}

// Skip returns the placeholder for a slot; an existing placeholder stays.
func Skip(s seal.Slot) (seal.Slot, error) {
	if s.Type == seal.TypeSkipped {
		return s, nil
	}
	data, err := json.Marshal(Missing{TypeOf(s), time.Now().UTC().Truncate(time.Second)})
	return seal.Slot{Type: seal.TypeSkipped, Node: s.Node, Data: data}, err
}

// MissingOf reads a placeholder. It may come from a keyring that nothing vouches for,
// and is displayed, so only types of slots are accepted.
func MissingOf(s seal.Slot) (d Missing, ok bool) {
	ok = s.Type == seal.TypeSkipped && json.Unmarshal(s.Data, &d) == nil &&
		((d.Type == seal.TypeTPM || d.Type == seal.TypeRecovery || IsSecondary(d.Type)) || Second(d.Type) != "")
	return d, ok
}

// KeepMissing keeps placeholders, and debts, in the rotations that follow.
type KeepMissing struct{}

// WrapLike implements rotation.Rewrapper.
func (KeepMissing) WrapLike(_ context.Context, _ *seal.Secret, like seal.Slot) (seal.Slot, error) {
	if like.Type != seal.TypeSkipped && like.Type != seal.TypeUnrevoked {
		return seal.Slot{}, seal.ErrNotMine
	}
	return like, nil
}

// TypeOf returns the type of a slot; for a placeholder, the type of the missing slot.
func TypeOf(s seal.Slot) string {
	if d, ok := MissingOf(s); ok {
		return d.Type
	}
	return s.Type
}

// ReportDropped lists the slots that a recovery neither made again nor replaced by a
// placeholder.
func ReportDropped(before, after []seal.Slot) (changes []string) {
	var said []string
	for _, s := range before {
		kind := TypeOf(s)
		if slices.Contains(said, kind) || slices.ContainsFunc(after, func(s seal.Slot) bool { return TypeOf(s) == kind }) {
			continue
		}
		said = append(said, kind)
		changes = append(changes, "there is no slot of "+kind+" any more, since unlock.order does not want it; kept copies of the former one still open what it held")
	}
	return changes
}

// WithMissing returns slots, followed by a placeholder for each wrapper of unlock.order
// that has no slot on this node. Such a placeholder is never stored.
func (r Reader) WithMissing(slots []seal.Slot) []seal.Slot {
	slots = slices.Clone(slots)
	for _, kind := range r.Order {
		if !slices.ContainsFunc(slots, func(s seal.Slot) bool {
			return TypeOf(s) == kind && (s.Node == "" || s.Node == r.Node)
		}) {
			slots = append(slots, r.missingSlot(kind))
		}
	}
	return slots
}

// missingSlot returns the placeholder for a slot that never existed.
func (r Reader) missingSlot(kind string) seal.Slot {
	s := seal.Slot{Type: seal.TypeSkipped}
	s.Data, _ = json.Marshal(Missing{Type: kind}) // these two fields always encode
	if kind == seal.TypeTPM || Second(kind) != "" {
		s.Node = r.Node
	}
	return s
}

// Remedy says how to repair a missing slot.
func (r Reader) Remedy(d Missing, slots []seal.Slot) string {
	if d.Type == seal.TypeRecovery {
		return "run kleidi slot add recovery --recipient age1…"
	}
	command := "kleidi slot add " + d.Type
	if ofTPM := d.Type == seal.TypeTPM || Second(d.Type) != ""; ofTPM && len(r.Demands(slots)) == 0 { // reseal follows what is sealed to this TPM
		command = "kleidi reseal --new-tpm"
	} else if ofTPM {
		command = "kleidi reseal"
	}
	switch {
	case HasTwoOfTwo(slots) && Second(d.Type) == "":
		return "set unlock.order to the two-of-two that the keyring holds; or, if one wrapper is to be enough, run " + command + " --break-two-of-two"
	case command == "kleidi reseal":
		return "run " + command + ", which seals to the running boot"
	case command == "kleidi reseal --new-tpm":
		return "run " + command + ", which seals to the TPM that is there"
	}
	return "run " + command + " once its backend answers, and is configured here"
}

// WhyMissing explains why nothing opens a missing slot.
func (r Reader) WhyMissing(d Missing, slots []seal.Slot) error {
	if d.Since.IsZero() {
		hint := r.Remedy(d, slots)
		if slices.ContainsFunc(slots, func(s seal.Slot) bool { return TypeOf(s) == d.Type && s.Node != "" && s.Node != r.Node }) { // of another node
			hint = "if this machine was renamed, set node to its former name; else " + hint
		}
		return seal.Errorf(seal.CauseNoSlot, hint, "unlock.order names %s, and the keyring holds no slot of it for this node", d.Type)
	}
	return seal.Errorf(seal.CauseNoSlot, r.Remedy(d, slots), "the rotation of %s did without this slot", d.Since.Local().Format(time.DateTime))
}

// ReportMissing lists the missing slots, each with its remedy.
func (r Reader) ReportMissing(slots []seal.Slot) (changes []string) {
	slots = r.WithMissing(slots)
	names := Names(slots)
	for i, s := range slots {
		if d, ok := MissingOf(s); ok {
			changes = append(changes, "WITHOUT SLOT "+names[i]+": the KEK is not wrapped by it; "+r.Remedy(d, slots))
		}
	}
	return changes
}

// ReportCompleted lists the slots that a rotation made for the first time.
func (r Reader) ReportCompleted(before, after []seal.Slot) (changes []string) {
	for _, s := range after {
		if s.Type != seal.TypeSkipped && !slices.ContainsFunc(before, func(b seal.Slot) bool { return TypeOf(b) == s.Type }) {
			changes = append(changes, "the KEK is wrapped by "+s.Type+" as well, which unlock.order names and had no slot: "+r.Binding(s))
		}
	}
	return changes
}

// ReportStillNamed says that unlock.order still names the removed slot, so a rotation
// would make it again.
func (r Reader) ReportStillNamed(slots []seal.Slot, kind string) []string {
	if !slices.ContainsFunc(r.WithMissing(slots), func(s seal.Slot) bool {
		d, ok := MissingOf(s)
		return ok && d.Since.IsZero() && d.Type == kind
	}) {
		return nil
	}
	warning := "unlock.order still names " + kind + ", so the slot counts as missing; take it out of unlock.order"
	if IsSecondary(kind) {
		warning += ", or the next rotation makes the slot again"
	}
	return []string{warning}
}

// OpensWithTPM reports whether the TPM may open the keyring.
func (r Reader) OpensWithTPM() bool {
	return slices.Contains(r.Order, seal.TypeTPM) || r.TwoOfTwo() != ""
}

// StayBeside returns the slots that stay beside a new slot of that type.
func StayBeside(slots []seal.Slot, kind string) []seal.Slot {
	if kind != seal.TypeRecovery {
		return slices.DeleteFunc(slots, func(s seal.Slot) bool { return TypeOf(s) == kind })
	}
	// There may be several placeholders, each for different recipients: one new slot
	// replaces one of them.
	if i := slices.IndexFunc(slots, func(s seal.Slot) bool { return s.Type == seal.TypeSkipped && TypeOf(s) == kind }); i >= 0 {
		return slices.Delete(slots, i, i+1)
	}
	return slots
}
