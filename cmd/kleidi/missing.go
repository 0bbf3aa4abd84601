package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// A way back that the configuration counts on has to be there: each wrapper of
// unlock.order has its place, with a slot in it or not.

// places returns slots, and behind them a place for each wrapper of unlock.order of
// which there is none for this node. Such a place is never stored.
func (n *node) places(slots []seal.Slot) []seal.Slot {
	slots = slices.Clone(slots)
	for _, kind := range n.cfg.Unlock.Order {
		if !slices.ContainsFunc(slots, func(s seal.Slot) bool {
			return typeName(s) == kind && (s.Node == "" || s.Node == n.cfg.Node)
		}) {
			slots = append(slots, n.place(kind))
		}
	}
	return slots
}

// place is where nothing was ever made.
func (n *node) place(kind string) seal.Slot {
	s := seal.Slot{Type: seal.TypeSkipped}
	s.Data, _ = json.Marshal(skippedSlot{Type: kind}) // two fields that can't fail
	if kind == seal.TypeTPM || twoOfTwo(kind) != "" {
		s.Node = n.cfg.Node
	}
	return s
}

// mend says how a place among slots is mended.
func (n *node) mend(d skippedSlot, slots []seal.Slot) string {
	if d.Type == seal.TypeRecovery {
		return "run kleidi slot add recovery --recipient age1…"
	}
	command := "kleidi slot add " + d.Type
	if ofTPM := d.Type == seal.TypeTPM || twoOfTwo(d.Type) != ""; ofTPM && len(n.demands(slots)) == 0 { // reseal goes by what is sealed to this TPM
		command = "kleidi reseal --new-tpm"
	} else if ofTPM {
		command = "kleidi reseal"
	}
	switch {
	case hasBoth(slots) && twoOfTwo(d.Type) == "":
		return "set unlock.order to the two-of-two that the keyring holds; or, if one wrapper is to be enough, run " + command + " with --break-two-of-two"
	case command == "kleidi reseal":
		return "run " + command + ", which seals to the running boot"
	case command == "kleidi reseal --new-tpm":
		return "run " + command + ", which seals to the TPM that is there"
	}
	return "run " + command + " once its backend answers, and is configured here"
}

// missing is why nothing opens in a place among slots.
func (n *node) missing(d skippedSlot, slots []seal.Slot) error {
	if d.Since.IsZero() {
		hint := n.mend(d, slots)
		if slices.ContainsFunc(slots, func(s seal.Slot) bool { return typeName(s) == d.Type && s.Node != "" && s.Node != n.cfg.Node }) { // of another node
			hint = "if this machine was renamed, set node to its former name; else " + hint
		}
		return seal.Errorf(seal.CauseNoSlot, hint, "unlock.order names %s, and the keyring holds no slot of it for this node", d.Type)
	}
	return seal.Errorf(seal.CauseNoSlot, n.mend(d, slots), "the rotation of %s did without this slot", d.Since.Local().Format(time.DateTime))
}

// leftOut says which slots are missing, and how each is mended.
func (n *node) leftOut(slots []seal.Slot) (changes []string) {
	slots = n.places(slots)
	names := slotNames(slots)
	for i, s := range slots {
		if d, ok := skippedBy(s); ok {
			changes = append(changes, "WITHOUT SLOT "+names[i]+": the KEK is not wrapped by it; "+n.mend(d, slots))
		}
	}
	return changes
}

// complete returns a keyring with a slot, or the place of one that is skipped, for
// each wrapper of unlock.order that has none: rotation follows slots. The TPM is left
// to reseal, which takes it as it is only when told so, and nothing is put beside a
// two-of-two that opens alone. Where nothing is missing that is k itself.
func (n *node) complete(ctx context.Context, k *keyring.Keyring, without []string) (*keyring.Keyring, error) {
	slots := k.Slots()
	all := n.places(slots)
	names := slotNames(all)
	for i := len(slots); i < len(all); i++ {
		s, kind := all[i], typeName(all[i])
		var err error
		switch {
		case slices.Contains(without, names[i]):
			s, err = skip(seal.Slot{Type: kind, Node: s.Node})
		case s.Node != "" || n.breaks(kind, k.Slots()) != nil:
			continue
		default:
			s, err = n.renewSecondary(ctx, kind, k.KEK())
		}
		if err != nil {
			return nil, noneMade(kind, err)
		}
		slots = append(slots, s)
	}
	if len(slots) == len(k.Slots()) {
		return k, nil
	}
	return k.WithSlots(slots)
}

// noneMade is why a wrapper that has no slot yet can't make one.
func noneMade(kind string, err error) error {
	return fmt.Errorf("unlock.order names %s, which has no slot yet: %w", kind, seal.AddHint(err, "to go on without the slot for now, run kleidi rotate --skip-slot "+kind))
}

// completed says which slots a rotation made that were not there before.
func (n *node) completed(before, after []seal.Slot) (changes []string) {
	for _, s := range after {
		if s.Type != seal.TypeSkipped && !slices.ContainsFunc(before, func(b seal.Slot) bool { return typeName(b) == s.Type }) {
			changes = append(changes, "the KEK is wrapped by "+s.Type+" as well, which unlock.order names and had no slot: "+n.binding(s))
		}
	}
	return changes
}

// stillNamed says that a slot was taken away which unlock.order counts on: rotation
// would undo that.
func (n *node) stillNamed(slots []seal.Slot, kind string) []string {
	if !slices.ContainsFunc(n.places(slots), func(s seal.Slot) bool {
		d, ok := skippedBy(s)
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
