package slotview

import (
	"encoding/json"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// ReportDropped lists the slots that a recovery neither made again nor replaced with a
// placeholder.
func ReportDropped(before, after []seal.Slot) (changes []string) {
	var reported []string
	for _, s := range before {
		kind := TypeOf(s)
		if slices.Contains(reported, kind) || slices.ContainsFunc(after, func(s seal.Slot) bool { return TypeOf(s) == kind }) {
			continue
		}
		reported = append(reported, kind)
		changes = append(changes, "the "+kind+" slot is gone, since unlock.order does not name it; kept copies of it still open the KEK that it held")
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
	if ofTPM := d.Type == seal.TypeTPM || Second(d.Type) != ""; ofTPM && len(r.Demands(slots)) == 0 { // reseal follows the slots of this TPM
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
		return "run " + command + ", which seals to the present TPM"
	}
	return "run " + command + " once its backend answers, and is configured here"
}

// WhyMissing explains why nothing opens a missing slot.
func (r Reader) WhyMissing(d Missing, slots []seal.Slot) error {
	if d.Since.IsZero() {
		hint := r.Remedy(d, slots)
		if slices.ContainsFunc(slots, func(s seal.Slot) bool { return TypeOf(s) == d.Type && s.Node != "" && s.Node != r.Node }) { // a slot of another node
			hint = "if this machine was renamed, set node to its former name; else " + hint
		}
		return seal.Errorf(seal.CauseNoSlot, hint, "unlock.order names %s, and the keyring holds no slot of it for this node", d.Type)
	}
	return seal.Errorf(seal.CauseNoSlot, r.Remedy(d, slots), "the rotation of %s skipped this slot", d.Since.Local().Format(time.DateTime))
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
