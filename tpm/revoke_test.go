package tpm_test

import (
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestPendingRevocation: an end of an epoch that did not come about is not
// forgotten by what is sealed afterwards, whichever way that is.
func TestPendingRevocation(t *testing.T) {
	for name, later := range map[string]func(n *node, kek *seal.Secret, pending seal.Slot) (seal.Slot, error){
		"rotated": func(n *node, kek *seal.Secret, pending seal.Slot) (seal.Slot, error) {
			return n.WrapLike(t.Context(), kek, pending)
		},
		"resealed": func(n *node, kek *seal.Secret, pending seal.Slot) (seal.Slot, error) {
			return n.ForNextEpoch([]seal.Slot{pending}).Wrap(t.Context(), kek)
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			kek := n.kek()
			old := n.wrap(kek)
			pending, err := n.ForNextEpoch([]seal.Slot{old}).Wrap(t.Context(), kek) // saved, and the epoch is not ended
			if err != nil {
				t.Fatal(err)
			}
			fresh, err := later(n, kek, pending)
			if err != nil {
				t.Fatal(err)
			}
			if err := n.Settle(t.Context(), []seal.Slot{fresh}); err != nil {
				t.Fatal(err)
			}
			n.refuses(old, seal.CauseEpoch)
			n.opens(fresh, kek)
			if name == "resealed" {
				n.refuses(pending, seal.CauseEpoch)
			}
		})
	}
}

// TestTPMTroubleIsNoDamage: a TPM that is full or has failed says nothing against
// the slot.
func TestTPMTroubleIsNoDamage(t *testing.T) {
	n := newNode(t)
	kek := n.kek()
	slot := n.wrap(kek)
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCObjectMemory, tpm2.TPMRCMemory, tpm2.TPMRCFailure, tpm2.TPMRCInitialize} {
		n.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCLoad, Do: tpmtest.Code(rc)})
		n.refuses(slot, seal.CauseUnavailable)
	}
	n.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCLoad, Do: tpmtest.Code(tpm2.TPMRCIntegrity)})
	n.refuses(slot, seal.CauseSlotCorrupt)
	n.proxy.Heal()
	n.opens(slot, kek)
}

// TestRevoke: what is revoked with nothing in its place is refused, again and again
// is harmless, and what is sealed afterwards opens.
func TestRevoke(t *testing.T) {
	n := newNode(t)
	kek := n.kek()
	old := n.wrap(kek)
	pending, err := n.ForNextEpoch([]seal.Slot{old}).Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := n.Revoke(t.Context(), []seal.Slot{old, pending}); err != nil {
			t.Fatal(err)
		}
		n.refuses(old, seal.CauseEpoch)
		n.refuses(pending, seal.CauseEpoch)
	}
	n.opens(n.wrap(kek), kek)
	other := newNode(t)
	if err := other.Revoke(t.Context(), []seal.Slot{old}); seal.CauseOf(err) != seal.CauseOtherTPM {
		t.Errorf("another TPM revokes it: %v", err)
	}
}
