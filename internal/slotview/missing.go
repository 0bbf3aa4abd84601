package slotview

import (
	"context"
	"encoding/json"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// Missing is the data of such a place. Nothing opens it.
type Missing struct {
	Type  string    `json:"type"`
	Since time.Time `json:"since,omitzero"` // of one that was there; else nothing was ever made
}

// Skip returns what stands in the place of a slot; a place that is there stays.
func Skip(s seal.Slot) (seal.Slot, error) {
	if s.Type == seal.TypeSkipped {
		return s, nil
	}
	data, err := json.Marshal(Missing{TypeOf(s), time.Now().UTC().Truncate(time.Second)})
	return seal.Slot{Type: seal.TypeSkipped, Node: s.Node, Data: data}, err
}

// MissingOf reads such a place. It may come from a keyring that nothing vouches for,
// and is shown: only types of slots are taken.
func MissingOf(s seal.Slot) (d Missing, ok bool) {
	ok = s.Type == seal.TypeSkipped && json.Unmarshal(s.Data, &d) == nil &&
		(slices.Contains([]string{seal.TypeTPM, seal.TypePKCS11, seal.TypeVault, seal.TypeRecovery}, d.Type) || Second(d.Type) != "")
	return d, ok
}

// KeepMissing keeps the place of a slot, and what is owed, in the rotations that follow.
type KeepMissing struct{}

// WrapLike implements rotation.Rewrapper.
func (KeepMissing) WrapLike(_ context.Context, _ *seal.Secret, like seal.Slot) (seal.Slot, error) {
	if like.Type != seal.TypeSkipped && like.Type != seal.TypeUnrevoked {
		return seal.Slot{}, seal.ErrNotMine
	}
	return like, nil
}

// TypeOf is the type of a slot, and that of the one in whose place a skipped one
// stands.
func TypeOf(s seal.Slot) string {
	if d, ok := MissingOf(s); ok {
		return d.Type
	}
	return s.Type
}

// ReportDropped says which slots a recovery did not make again, and left no place for.
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

// WithMissing returns slots, and behind them a place for each wrapper of unlock.order of
// which there is none for this node. Such a place is never stored.
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

// missingSlot is where nothing was ever made.
func (r Reader) missingSlot(kind string) seal.Slot {
	s := seal.Slot{Type: seal.TypeSkipped}
	s.Data, _ = json.Marshal(Missing{Type: kind}) // two fields that can't fail
	if kind == seal.TypeTPM || Second(kind) != "" {
		s.Node = r.Node
	}
	return s
}

// Remedy says how a place among slots is mended.
func (r Reader) Remedy(d Missing, slots []seal.Slot) string {
	if d.Type == seal.TypeRecovery {
		return "run kleidi slot add recovery --recipient age1…"
	}
	command := "kleidi slot add " + d.Type
	if ofTPM := d.Type == seal.TypeTPM || Second(d.Type) != ""; ofTPM && len(r.Demands(slots)) == 0 { // reseal goes by what is sealed to this TPM
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

// WhyMissing is why nothing opens in a place among slots.
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

// ReportMissing says which slots are missing, and how each is mended.
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

// ReportCompleted says which slots a rotation made that were not there before.
func (r Reader) ReportCompleted(before, after []seal.Slot) (changes []string) {
	for _, s := range after {
		if s.Type != seal.TypeSkipped && !slices.ContainsFunc(before, func(b seal.Slot) bool { return TypeOf(b) == s.Type }) {
			changes = append(changes, "the KEK is wrapped by "+s.Type+" as well, which unlock.order names and had no slot: "+r.Binding(s))
		}
	}
	return changes
}

// ReportStillNamed says that a slot was taken away which unlock.order counts on: rotation
// would undo that.
func (r Reader) ReportStillNamed(slots []seal.Slot, kind string) []string {
	if !slices.ContainsFunc(r.WithMissing(slots), func(s seal.Slot) bool {
		d, ok := MissingOf(s)
		return ok && d.Since.IsZero() && d.Type == kind
	}) {
		return nil
	}
	warning := "unlock.order still names " + kind + ", so the slot counts as missing; take it out of unlock.order"
	if kind == seal.TypePKCS11 || kind == seal.TypeVault {
		warning += ", or the next rotation makes the slot again"
	}
	return []string{warning}
}

// OpensWithTPM reports whether the TPM is among what may open the keyring.
func (r Reader) OpensWithTPM() bool {
	return slices.Contains(r.Order, seal.TypeTPM) || r.TwoOfTwo() != ""
}

// StayBeside returns the slots that stay beside a new one of that type.
func StayBeside(slots []seal.Slot, kind string) []seal.Slot {
	if kind != seal.TypeRecovery {
		return slices.DeleteFunc(slots, func(s seal.Slot) bool { return TypeOf(s) == kind })
	}
	// There may be several, each for recipients of its own: one new slot mends one place.
	if i := slices.IndexFunc(slots, func(s seal.Slot) bool { return s.Type == seal.TypeSkipped && TypeOf(s) == kind }); i >= 0 {
		return slices.Delete(slots, i, i+1)
	}
	return slots
}
