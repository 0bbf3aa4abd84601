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
			kek := n.KEK()
			old := n.Sealed(kek)
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
			n.Refuses(old, seal.CauseEpoch)
			n.Opens(fresh, kek)
			if name == "resealed" {
				n.Refuses(pending, seal.CauseEpoch)
			}
		})
	}
}

// TestTPMTroubleIsNoDamage: a full or failing TPM is no evidence against the slot.
func TestTPMTroubleIsNoDamage(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	slot := n.Sealed(kek)
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCObjectMemory, tpm2.TPMRCMemory, tpm2.TPMRCFailure, tpm2.TPMRCInitialize} {
		n.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCLoad, Do: tpmtest.Code(rc)})
		n.Refuses(slot, seal.CauseUnavailable)
	}
	n.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCLoad, Do: tpmtest.Code(tpm2.TPMRCIntegrity)})
	n.Refuses(slot, seal.CauseSlotCorrupt)
	n.Proxy.Heal()
	n.Opens(slot, kek)
}

// TestRevoke: a slot revoked without a successor is refused. Revoking again is
// harmless, and later slots open.
func TestRevoke(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	old := n.Sealed(kek)
	pending, err := n.ForNextEpoch([]seal.Slot{old}).Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := n.Revoke(t.Context(), []seal.Slot{old, pending}); err != nil {
			t.Fatal(err)
		}
		n.Refuses(old, seal.CauseEpoch)
		n.Refuses(pending, seal.CauseEpoch)
	}
	n.Opens(n.Sealed(kek), kek)
	other := newNode(t)
	if err := other.Revoke(t.Context(), []seal.Slot{old}); seal.CauseOf(err) != seal.CauseOtherTPM {
		t.Errorf("another TPM revokes it: %v", err)
	}
}
