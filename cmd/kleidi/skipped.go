package main

import (
	"context"
	"encoding/json"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// The place of a slot that could not be made: it stays, and is shown, until it is mended.

// skippedSlot is the data of such a place. Nothing opens it.
type skippedSlot struct {
	Type  string    `json:"type"`
	Since time.Time `json:"since,omitzero"` // of one that was there; else nothing was ever made
}

// skip returns what stands in the place of a slot; a place that is there stays.
func skip(s seal.Slot) (seal.Slot, error) {
	if s.Type == seal.TypeSkipped {
		return s, nil
	}
	data, err := json.Marshal(skippedSlot{typeName(s), time.Now().UTC().Truncate(time.Second)})
	return seal.Slot{Type: seal.TypeSkipped, Node: s.Node, Data: data}, err
}

// skippedBy reads such a place. It may come from a keyring that nothing vouches for,
// and is shown: only types of slots are taken.
func skippedBy(s seal.Slot) (d skippedSlot, ok bool) {
	ok = s.Type == seal.TypeSkipped && json.Unmarshal(s.Data, &d) == nil &&
		(slices.Contains([]string{seal.TypeTPM, seal.TypePKCS11, seal.TypeVault, seal.TypeRecovery}, d.Type) || twoOfTwo(d.Type) != "")
	return d, ok
}

// skipped keeps the place of a slot in the rotations that follow.
type skipped struct{}

// WrapLike implements rotation.Rewrapper.
func (skipped) WrapLike(_ context.Context, _ *seal.Secret, like seal.Slot) (seal.Slot, error) {
	if like.Type != seal.TypeSkipped {
		return seal.Slot{}, seal.ErrNotMine
	}
	return like, nil
}

// typeName is the type of a slot, and that of the one in whose place a skipped one
// stands.
func typeName(s seal.Slot) string {
	if d, ok := skippedBy(s); ok {
		return d.Type
	}
	return s.Type
}

// dropped says which slots a recovery did not make again, and left no place for.
func dropped(before, after []seal.Slot) (changes []string) {
	var said []string
	for _, s := range before {
		kind := typeName(s)
		if slices.Contains(said, kind) || slices.ContainsFunc(after, func(s seal.Slot) bool { return typeName(s) == kind }) {
			continue
		}
		said = append(said, kind)
		changes = append(changes, "there is no slot of "+kind+" any more, since unlock.order does not want it; kept copies of the former one still open what it held")
	}
	return changes
}
