package tpm_test

import (
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
)

// TestCounterWentBack: slots are far above the counter, as after the roll-back of a
// virtual TPM. kleidi refuses to make slots that would only claim to revoke them, and
// makes the slots that recover needs.
func TestCounterWentBack(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	ahead := n.Sealed(kek)
	for range tpm.MaxRaise { // saved, and never settled
		next, err := n.ForNextEpoch([]seal.Slot{ahead}).Wrap(t.Context(), kek)
		if err != nil {
			t.Fatal(err)
		}
		ahead = next
	}
	strict, err := n.With(tpm.SealOptions{NextEpoch: true, Revoke: []seal.Slot{ahead}, SameTPMAs: []seal.Slot{ahead}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = strict.Wrap(t.Context(), kek)
	n.Want(err, seal.CauseEpoch, "the epoch counter went back", "can't revoke those copies")

	fresh, err := n.ForNextEpoch([]seal.Slot{ahead}).Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Settle(t.Context(), []seal.Slot{fresh}); err != nil {
		t.Fatal(err)
	}
	n.Opens(fresh, kek)
	n.Opens(ahead, kek) // that is why strict refuses
}
