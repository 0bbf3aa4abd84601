package node_test

import (
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

var recoverySlot = seal.Slot{Type: seal.TypeRecovery, Data: []byte("{}")}

// wrapped returns the node's open keyring, in a slot of the plugin and a recovery slot.
func wrapped(t *testing.T, n *node.Node) *keyring.Keyring {
	t.Helper()
	bare := nodetest.Keyring(t, recoverySlot)
	slot, err := n.KMSPlugin.Wrap(t.Context(), bare.KEK())
	if err != nil {
		t.Fatal(err)
	}
	k, err := bare.WithSlots([]seal.Slot{slot, recoverySlot})
	if err != nil {
		t.Fatal(err)
	}
	nodetest.Hold(t, n, k)
	if k, err = n.Unlocker.Keyring(); err != nil {
		t.Fatal(err)
	}
	return k
}

func skipped(t *testing.T, s seal.Slot) seal.Slot {
	t.Helper()
	missing, err := slotview.Skip(s)
	if err != nil {
		t.Fatal(err)
	}
	return missing
}

// TestOpensSlot: a slot opens if its wrapper gives the KEK of the key ID. A missing slot
// says that it is missing.
func TestOpensSlot(t *testing.T) {
	p := nodetest.NewPlugin(t)
	n := nodetest.New(t, p.Opens)
	k := wrapped(t, n)
	slot := k.Slots()[0]
	if err := n.TryOpenOrMissing(t.Context(), k.Slots(), slot, k.CurrentID(), k.ClusterID()); err != nil {
		t.Error(err)
	}
	err := n.TryOpen(t.Context(), slot, "k1-other", k.ClusterID())
	if seal.CauseOf(err) != seal.CauseSlotCorrupt || !strings.Contains(err.Error(), string(k.CurrentID())) || !strings.Contains(err.Error(), "kleidi slot rewrap") {
		t.Errorf("of another key ID: %v", err)
	}
	if err := n.TryOpenOrMissing(t.Context(), k.Slots(), skipped(t, slot), k.CurrentID(), k.ClusterID()); err == nil || !strings.Contains(err.Error(), "kms-plugin") {
		t.Errorf("a missing slot: %v", err)
	}
	p.Stop()
	if err := n.TryOpen(t.Context(), slot, k.CurrentID(), k.ClusterID()); seal.CauseOf(err) != seal.CauseUnavailable {
		t.Errorf("without the plugin: %v", err)
	}
}

// TestRequireOpener: before a slot goes, another one must open whose wrapper may open at
// start on this node. The slots are tried, because their presence proves nothing.
func TestRequireOpener(t *testing.T) {
	p := nodetest.NewPlugin(t)
	n, only := nodetest.New(t, p.Opens), nodetest.New(t, p.Configured)
	k := wrapped(t, n)
	slot := k.Slots()[0]
	elsewhere := seal.Slot{Type: slot.Type, Node: "cp-2", Data: slot.Data}
	const last = "it is the last slot that can open the keyring on this node; add another one first"
	check := func(name string, n *node.Node, slots []seal.Slot, says string) {
		t.Helper()
		err := n.RequireOpener(t.Context(), k, slots)
		if (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", name, err, says)
		}
	}
	check("the plugin", n, []seal.Slot{recoverySlot, slot}, "")
	check("none", n, nil, last)
	check("recovery alone", n, []seal.Slot{recoverySlot}, last)
	check("another node's", n, []seal.Slot{elsewhere}, last)
	check("not in unlock.order", only, []seal.Slot{slot}, last)
	p.Replace()
	check("another key", n, []seal.Slot{slot}, "no other slot opens the keyring on this node now: ")
	check("the last one counts", n, []seal.Slot{slot, recoverySlot}, "no other slot opens the keyring on this node now: ")
}

// TestCanOpen: the slots of wrappers in unlock.order can open, tried or not.
func TestCanOpen(t *testing.T) {
	plugin, token := seal.Slot{Type: seal.TypeKMSPlugin, Data: []byte("{}")}, seal.Slot{Type: seal.TypePKCS11, Data: []byte("{}")}
	n := nodetest.New(t, nodetest.Opens(seal.TypeKMSPlugin))
	for name, row := range map[string]struct {
		slots []seal.Slot
		can   bool
	}{
		"none": {nil, false}, "recovery": {[]seal.Slot{recoverySlot}, false}, "not in unlock.order": {[]seal.Slot{token}, false},
		"in unlock.order": {[]seal.Slot{recoverySlot, plugin}, true}, "left out": {[]seal.Slot{skipped(t, plugin)}, false},
	} {
		if n.CanOpen(row.slots) != row.can {
			t.Errorf("%s: %v", name, !row.can)
		}
	}
}

// TestResult: a result names the former key ID only if it changed. A locked node has none.
func TestResult(t *testing.T) {
	n := nodetest.New(t)
	if _, err := n.Unchanged(); err == nil || n.OpenSlots() != nil {
		t.Errorf("locked: %v, slots %v", err, n.OpenSlots())
	}
	k := nodetest.Keyring(t, recoverySlot)
	nodetest.Hold(t, n, k)
	s, err := n.Unchanged("one", "two")
	if err != nil || s.Former != "" || s.CurrentKeyID != k.CurrentID() || s.Revision != k.Revision() || !slices.Equal(s.Changes, []string{"one", "two"}) {
		t.Errorf("%+v, %v", s, err)
	}
	if s, err = n.Result("k1-former"); err != nil || s.Former != "k1-former" {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestUntrustedKeys: a backend whose key does not open its slot receives no fresh KEK, and
// one that was left out doesn't either. Backends without a slot may.
func TestUntrustedKeys(t *testing.T) {
	p := nodetest.NewPlugin(t)
	n := nodetest.New(t, p.Opens)
	k := wrapped(t, n)
	if all := n.UntrustedKeys(t.Context(), k); len(all) != 0 {
		t.Errorf("%v", all)
	}
	left, err := k.WithSlots([]seal.Slot{skipped(t, k.Slots()[0]), recoverySlot})
	if err != nil {
		t.Fatal(err)
	}
	defer left.Close()
	if all := n.UntrustedKeys(t.Context(), left); !slices.Equal(slices.Collect(maps.Keys(all)), []string{seal.TypeKMSPlugin}) {
		t.Errorf("left out: %v", all)
	}
	rewrap := rotation.Like(n.ProvenRewrappers(k), k.Slots()[:1])
	if _, err := rewrap(t.Context(), k.KEK()); err != nil {
		t.Errorf("the plugin with its key: %v", err)
	}
	p.Replace()
	all := n.UntrustedKeys(t.Context(), k)
	if other, ok := errors.AsType[*node.OtherKeyError](all[seal.TypeKMSPlugin]); !ok || !strings.Contains(other.Error(), "kleidi slot rewrap kms-plugin --new-key") {
		t.Errorf("another key: %v", all)
	}
	if _, err := rewrap(t.Context(), k.KEK()); err == nil || !strings.Contains(err.Error(), "its key may have been replaced") {
		t.Errorf("the plugin with another key receives a KEK: %v", err)
	}
}

// TestRewrappers: the wrappers of a rotation follow the configuration. They include the
// recovery slots' and the one that keeps a missing slot missing.
func TestRewrappers(t *testing.T) {
	p := nodetest.NewPlugin(t)
	for name, row := range map[string]struct {
		amend func(*config.Config)
		n     int
	}{
		"the TPM": {func(*config.Config) {}, 3}, "a plugin": {p.Opens, 4},
		"two of two": {func(c *config.Config) { p.Configured(c); c.Unlock.Order = []string{seal.TypeTPMAndKMSPlugin} }, 5},
	} {
		if got := nodetest.New(t, row.amend).Rewrappers(); len(got) != row.n {
			t.Errorf("%s: %d, want %d", name, len(got), row.n)
		}
	}
}

// TestAcquireState: while another process holds the state folder, the refusal names the
// admin socket on which nothing answers. Close gives the folder back.
func TestAcquireState(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "admin.sock")
	n := nodetest.New(t, func(c *config.Config) { c.Admin.Socket = socket })
	if err := n.AcquireState(); err != nil {
		t.Fatal(err)
	}
	if err := n.AcquireState(); err != nil {
		t.Errorf("twice by one process: %v", err)
	}
	other := nodetest.Again(t, n)
	if err := other.AcquireState(); !errors.Is(err, store.ErrLocked) || !strings.Contains(err.Error(), "looks for that socket at "+socket) {
		t.Errorf("%v", err)
	}
	n.Close()
	if err := other.AcquireState(); err != nil {
		t.Errorf("after Close: %v", err)
	}
}

// TestAcquireStateFails: a state folder that can't be made is a fault of the disk, and the
// hint names its setting.
func TestAcquireStateFails(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n := nodetest.New(t, func(c *config.Config) { c.State.Dir = filepath.Join(file, "state") })
	if err := n.AcquireState(); seal.CauseOf(err) != seal.CauseStore || !strings.Contains(err.Error(), "state.dir") {
		t.Errorf("%v", err)
	}
}

// TestStored: a missing keyring names the ways to get one. A damaged one is not taken for
// missing.
func TestStored(t *testing.T) {
	n := nodetest.New(t)
	if _, _, err := n.Stored(t.Context()); seal.CauseOf(err) != seal.CauseKeyringMissing || !strings.Contains(err.Error(), unlock.HintMissing) {
		t.Errorf("missing: %v", err)
	}
	if err := n.AcquireState(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.Config.Keyring(), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := n.Stored(t.Context()); err == nil || seal.CauseOf(err) == seal.CauseKeyringMissing {
		t.Errorf("damaged: %v", err)
	}
	k := nodetest.Keyring(t, recoverySlot)
	if err := os.WriteFile(n.Config.Keyring(), k.Marshal(), 0o600); err != nil {
		t.Fatal(err)
	}
	if u, _, err := n.Stored(t.Context()); err != nil || u.CurrentID() != k.CurrentID() {
		t.Errorf("%v, %v", u, err)
	}
}

// TestAttest: a machine that uses no TPM is not attested. One that must be, and has no
// TPM, is refused.
func TestAttest(t *testing.T) {
	if err := nodetest.New(t, nodetest.Opens(seal.TypePKCS11)).Attest(t.Context(), nil); err != nil {
		t.Errorf("without a TPM: %v", err)
	}
	none := filepath.Join(t.TempDir(), "log")
	n := nodetest.New(t, func(c *config.Config) {
		c.TPM.Device, c.TPM.EventLog, c.Unlock.RequireAttestation = none, none, true
	})
	if err := n.Attest(t.Context(), nil); err == nil || !strings.Contains(err.Error(), none) {
		t.Errorf("with nothing to attest: %v", err)
	}
}

// TestCarrier: a node without a cluster store can still give and take carried keyrings.
func TestCarrier(t *testing.T) {
	alone := nodetest.New(t)
	if alone.Replica != nil || alone.Archives != nil || node.Carrier(alone) == nil {
		t.Errorf("alone: %v, %v", alone.Replica, alone.Archives)
	}
	n := nodetest.New(t, func(c *config.Config) { c.Cluster.Kubeconfig = "/etc/kleidi/kubeconfig" })
	if n.Replica == nil || n.Archives == nil || node.Carrier(n) != n.Replica {
		t.Errorf("with a store: %v, %v", n.Replica, n.Archives)
	}
}

// TestWarnTPM: the log names a device that other users may use.
func TestWarnTPM(t *testing.T) {
	device := filepath.Join(t.TempDir(), "tpm")
	if err := os.WriteFile(device, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n := nodetest.New(t, func(c *config.Config) { c.TPM.Device = device })
	log := &nodetest.Log{}
	n.Log = slog.New(log)
	if n.WarnTPM(); len(log.Lines()) != 0 {
		t.Errorf("%q", log.Lines())
	}
	if err := os.Chmod(device, 0o666); err != nil {
		t.Fatal(err)
	}
	if n.WarnTPM(); len(log.Lines()) != 1 || log.Count("device="+device+" who=") != 1 {
		t.Errorf("%q", log.Lines())
	}
}
