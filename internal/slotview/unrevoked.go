package slotview

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
)

// Debt is an owed revocation: a TPM that was unavailable or was replaced could not be
// told to refuse the copies of a removed slot.
type Debt struct {
	tpm.Copies
	Since time.Time `json:"since"`
}

// Describe says where the copies still open.
func (d Debt) Describe() string {
	return fmt.Sprintf("still open with the TPM of endorsement key %s, up to its epoch %d", d.EK, d.AtMost)
}

// Remedy says how to end the debt.
func (d Debt) Remedy() string {
	return "clear that TPM or destroy it, then run kleidi slot forget-copies --ek " + d.EK + "; see \"The former board\" in docs/recovery.md"
}

// debts is the data of a slot of type unrevoked.
type debts struct {
	Debts []Debt `json:"debts"`
}

// maxDebts bounds the debts of one node: the latest stay. Each takes some 250 bytes.
const maxDebts = 32

// Debts returns the debts among slots of this node.
func (r Reader) Debts(slots []seal.Slot) []Debt {
	var all []Debt
	for _, s := range slots {
		var d debts
		if s.Type == seal.TypeUnrevoked && s.Node == r.Node && json.Unmarshal(s.Data, &d) == nil {
			all = append(all, d.Debts...)
		}
	}
	return all
}

// WithoutDebts returns the slots that hold a KEK.
func WithoutDebts(slots []seal.Slot) []seal.Slot {
	return slices.DeleteFunc(slices.Clone(slots), func(s seal.Slot) bool { return s.Type == seal.TypeUnrevoked })
}

// WithDebts returns slots with these debts of this node in place of the node's former
// ones.
func (r Reader) WithDebts(slots []seal.Slot, all []Debt) ([]seal.Slot, error) {
	slots = slices.DeleteFunc(slices.Clone(slots), func(s seal.Slot) bool { return s.Type == seal.TypeUnrevoked && s.Node == r.Node })
	if len(all) == 0 {
		return slots, nil
	}
	all = slices.Clone(all)
	slices.SortStableFunc(all, func(a, b Debt) int { return a.Since.Compare(b.Since) })
	data, err := json.Marshal(debts{all[max(0, len(all)-maxDebts):]})
	return append(slots, seal.Slot{Type: seal.TypeUnrevoked, Node: r.Node, Data: data}), err
}

// Owing returns after, the slots that replace before, together with the debts: the former
// ones, and one for each of this node's TPM slots that is gone without a later slot on
// the same counter. If there is a later slot, the counter is raised when that slot is
// stored, and at every start. A TPM that was cleared in the meantime owes nothing,
// because its storage root key is gone.
func (r Reader) Owing(before, after []seal.Slot) ([]seal.Slot, error) {
	var owed []Debt
	for _, d := range r.Debts(before) { // the same debt may be in several keyrings
		owed = merge(owed, d)
	}
	kept := r.copies(after)
	for _, c := range r.copies(gone(before, after)) {
		if slices.ContainsFunc(kept, func(k tpm.Copies) bool {
			return k.SameCounter(c) && k.AtMost > c.AtMost || k.EK == c.EK && string(k.SRK) != string(c.SRK)
		}) {
			continue
		}
		owed = merge(owed, Debt{c, time.Now().UTC().Truncate(time.Second)})
	}
	return r.WithDebts(after, owed)
}

// merge adds a debt. Two debts of one counter become one, with the higher epoch.
func merge(owed []Debt, d Debt) []Debt {
	i := slices.IndexFunc(owed, func(o Debt) bool { return o.SameCounter(d.Copies) })
	if i < 0 {
		return append(owed, d)
	}
	owed[i].AtMost = max(owed[i].AtMost, d.AtMost)
	return owed
}

// gone returns the slots of before that are not in after.
func gone(before, after []seal.Slot) []seal.Slot {
	return slices.DeleteFunc(slices.Clone(before), func(s seal.Slot) bool {
		return slices.ContainsFunc(after, func(a seal.Slot) bool { return a.Type == s.Type && a.Node == s.Node && bytes.Equal(a.Data, s.Data) })
	})
}

// copies returns the places where copies of this node's TPM slots open.
func (r Reader) copies(slots []seal.Slot) []tpm.Copies {
	var all []tpm.Copies
	for _, s := range TPMParts(slots) {
		if s.Type != seal.TypeTPM || s.Node != r.Node {
			continue
		}
		if c, err := tpm.CopiesOf(s); err == nil { // an unreadable slot opens nothing
			all = append(all, c)
		}
	}
	slices.SortFunc(all, func(a, b tpm.Copies) int { return cmp.Compare(a.AtMost, b.AtMost) })
	return all
}

// Revokes reports whether TPM slots of before are missing in after without a debt for
// them. Then a TPM refuses every copy of them, once the counter is raised.
func (r Reader) Revokes(before, after []seal.Slot) bool {
	owed, gone := r.Debts(after), r.copies(gone(before, after))
	return len(gone) > 0 && !slices.ContainsFunc(gone, func(c tpm.Copies) bool {
		return slices.ContainsFunc(owed, func(d Debt) bool { return d.SameCounter(c) })
	})
}
