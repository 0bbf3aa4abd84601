package slotview

import (
	"context"
	"encoding/json"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// Missing is the data of a placeholder for a missing slot. Nothing opens it.
type Missing struct {
	Type  string    `json:"type"`
	Since time.Time `json:"since,omitzero"` // when the slot was left out; zero if it never existed
}

// Skip returns the placeholder for a slot; an existing placeholder stays.
func Skip(s seal.Slot) (seal.Slot, error) {
	if s.Type == seal.TypeSkipped {
		return s, nil
	}
	data, err := json.Marshal(Missing{TypeOf(s), time.Now().UTC().Truncate(time.Second)})
	return seal.Slot{Type: seal.TypeSkipped, Node: s.Node, Data: data}, err
}

// MissingOf reads a placeholder. The placeholder may come from a keyring that nothing
// authenticates, and is displayed, so only types of slots are accepted.
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
