package lifecycle

import (
	"bytes"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
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
	cfg := config.Default()
	cfg.Node, cfg.State.Dir = "cp-1", filepath.Join(t.TempDir(), "state")
	cfg.TPM.Device, cfg.TPM.EventLog, cfg.TPM.UserspaceEventLog = m.Device(), m.EventLog(), m.UserspaceLog()
	n, err := node.New(cfg, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	identity, seeds := fill(t, n)

	// Two of two needs a fresh KEK, for which there is no room.
	single := cfg.Unlock.Order
	cfg.Unlock.Order = []string{seal.TypeTPMAndPKCS11}
	n.View.Order = cfg.Unlock.Order
	_, err = Recover(t.Context(), n, admin.RecoverRequest{Identity: bytes.Clone(identity), BreakTwoOfTwo: true})
	if err == nil || !strings.Contains(err.Error(), "two of two wants a fresh KEK") || !strings.Contains(err.Error(), "set unlock.order to tpm") {
		t.Errorf("recover to two of two: %v", err)
	}
	cfg.Unlock.Order, n.View.Order = single, single

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

// fill stores a keyring with as many retired KEKs as possible. It returns the recovery
// identity, and each key ID encrypted under its own KEK.
func fill(t *testing.T, n *node.Node) (identity []byte, seeds map[seal.KeyID][]byte) {
	t.Helper()
	secret, recipient, err := recovery.GenerateIdentity(n.Memory)
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	secret.With(func(b []byte) { identity = bytes.Clone(b) })
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
	for range keyring.MaxRetired {
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
