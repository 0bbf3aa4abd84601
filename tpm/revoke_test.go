package tpm_test

import (
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestPendingRevocation: every later seal takes an unfinished end of an epoch into
// account.
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
			pending, err := n.ForNextEpoch([]seal.Slot{old}).Wrap(t.Context(), kek) // saved, but the epoch was not ended
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

// TestTPMTroubleIsNoDamage: a full or failing TPM is no evidence against the slot.
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

// TestRevoke: a slot revoked without a successor is refused. Revoking again is
// harmless, and later slots open.
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
