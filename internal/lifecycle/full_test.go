package lifecycle

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestFullKeyring: with no room for another retired KEK, rotate says so and
// changes nothing, and recover still opens the keyring, but not as a two-of-two.
func TestFullKeyring(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	n := nodetest.New(t, nodetest.OnTPM(m))
	identity, seeds := fill(t, n, keyring.MaxRetired)

	// Two-of-two needs a fresh KEK, for which there is no room.
	single := n.Config.Unlock.Order
	n.Config.Unlock.Order = []string{seal.TypeTPMAndPKCS11}
	n.View.Order = n.Config.Unlock.Order
	_, err := Recover(t.Context(), n, admin.RecoverRequest{Identity: bytes.Clone(identity), BreakTwoOfTwo: true})
	if err == nil || !strings.Contains(err.Error(), "two of two needs a fresh KEK") || !strings.Contains(err.Error(), "set unlock.order to tpm") {
		t.Errorf("recover to two of two: %v", err)
	}
	n.Config.Unlock.Order, n.View.Order = single, single

	state, err := Recover(t.Context(), n, admin.RecoverRequest{Identity: identity})
	if err != nil {
		t.Fatalf("recover: %v", err)
	}
	if state.Former != "" {
		t.Errorf("the key ID changed from %s, with no room to retire it", state.Former)
	}
	k, err := n.Unlocker.Keyring()
	if err != nil {
		t.Fatal(err)
	}
	for id, sealed := range seeds {
		if seed, err := k.Decrypt(id, sealed); err != nil || string(seed) != string(id) {
			t.Errorf("%s: %v", id, err)
		}
	}
	if _, err := Rotate(t.Context(), n, admin.RotateRequest{}); err == nil || !strings.Contains(err.Error(), "no more fit") || !strings.Contains(err.Error(), "docs/operations.md") {
		t.Errorf("rotate: %v", err)
	}
	if _, err := reseal.Present(t.Context(), n, admin.ResealRequest{}); err != nil {
		t.Errorf("reseal: %v", err)
	}
}

// TestRotateReminds: a rotation warns of the limit while there is still ample room.
func TestRotateReminds(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	n := nodetest.New(t, nodetest.OnTPM(m))
	identity, _ := fill(t, n, 189)
	reminder := func(s admin.KeyringState, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		for _, said := range s.Changes {
			if strings.Contains(said, "kleidi prune KEYID") {
				return said
			}
		}
		return ""
	}
	if said := reminder(Recover(t.Context(), n, admin.RecoverRequest{Identity: identity})); said != "" {
		t.Errorf("recover, to 190: %s", said)
	}
	if said := reminder(Rotate(t.Context(), n, admin.RotateRequest{})); said != "" {
		t.Errorf("191: %s", said)
	}
	if said := reminder(Rotate(t.Context(), n, admin.RotateRequest{})); !strings.Contains(said, "holds 192 retired KEKs, of at most 256") {
		t.Errorf("192: %q", said)
	}
}

// fill stores a keyring with that many retired KEKs. It returns the recovery identity,
// and each key ID encrypted under its own KEK.
func fill(t *testing.T, n *node.Node, retired int) (identity []byte, seeds map[seal.KeyID][]byte) {
	t.Helper()
	identity, recipient := nodetest.Identity(t)
	w, err := recovery.NewWrapper(n.Memory, []string{recipient})
	if err != nil {
		t.Fatal(err)
	}
	fresh := func() (*seal.Secret, []seal.Slot) {
		kek, err := n.Memory.NewKEK()
		if err != nil {
			t.Fatal(err)
		}
		return kek, []seal.Slot{{Type: seal.TypeVault, Data: []byte(`{}`)}}
	}
	kek, slots := fresh()
	k, err := keyring.New(seal.ClusterID{1}, kek, slots, []keyring.Node{{Name: "cp-1"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	seeds = map[seal.KeyID][]byte{}
	for range retired {
		if seeds[k.CurrentID()], _, err = k.Encrypt([]byte(k.CurrentID())); err != nil {
			t.Fatal(err)
		}
		kek, slots = fresh()
		staged, err := k.Stage(kek, slots, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		k.Close()
		if k, err = staged.Activate(time.Now()); err != nil {
			t.Fatal(err)
		}
		staged.Close()
	}
	slot, err := w.Wrap(t.Context(), k.KEK())
	if err != nil {
		t.Fatal(err)
	}
	full, err := k.WithSlots([]seal.Slot{slot})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.AcquireState(); err != nil {
		t.Fatal(err)
	}
	if err := n.Anchor.Save(t.Context(), full.Anchor()); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Keyring.Save(t.Context(), full.Marshal(), ""); err != nil {
		t.Fatal(err)
	}
	return identity, seeds
}
