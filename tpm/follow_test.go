package tpm_test

import (
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// TestWrapLikeDoesNotRevive: a revoked slot is no model for another slot.
func TestWrapLikeDoesNotRevive(t *testing.T) {
	n := newNode(t)
	old := n.Sealed(n.KEK())
	next := n.ForNextEpoch([]seal.Slot{old})
	kek := n.KEK()
	slot, err := next.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.WrapLike(t.Context(), kek, old); err != nil {
		t.Errorf("before it is revoked: %v", err)
	}
	if err := n.Settle(t.Context(), []seal.Slot{slot}); err != nil {
		t.Fatal(err)
	}
	_, err = n.WrapLike(t.Context(), kek, old)
	n.Want(err, seal.CauseEpoch, "a revoked slot is not sealed again")
	if again, err := n.WrapLike(t.Context(), kek, slot); err != nil {
		t.Errorf("a slot of the present epoch: %v", err)
	} else {
		n.Opens(again, kek)
	}
}
