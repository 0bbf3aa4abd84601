package rollout

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/replica/storetest"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// onTPM returns the entry of a node with the TPM of a simulated machine.
func onTPM(t *testing.T, name string) keyring.Node {
	t.Helper()
	p, err := nodetest.New(t, nodetest.Named(name), nodetest.OnTPM(tpmtest.New(t, simboot.Baseline(simboot.UKI)))).TPM.Self(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return keyring.Node{Name: name, EK: p.EK, SRK: p.SRK, EpochIndex: p.Epoch.Index()}
}

// booted is a boot state whose PCR 7 has that hexadecimal digit in each place.
func booted(digit string) keyring.RecordedState {
	return keyring.RecordedState{Bank: "sha256", PCRs: map[string]string{"7": strings.Repeat(digit, 64)}, AtMost: 3}
}

// wrappedFor returns the boot states that the import slots of a node demand.
func wrappedFor(t *testing.T, entry keyring.Node, slots []seal.Slot, cluster seal.ClusterID) []keyring.RecordedState {
	t.Helper()
	counter, err := nv.NewCounter(entry.EpochIndex, keys.Owner{})
	if err != nil {
		t.Fatal(err)
	}
	states, err := slotview.Reader{Node: entry.Name, Counter: counter}.RecordStates(slots, cluster)
	if err != nil {
		t.Fatal(err)
	}
	return states
}

// TestWrapFor: each boot state of a node has one slot, which demands that state. One state
// that can't be wrapped for is an error, so that no node is left out of a rotation.
func TestWrapFor(t *testing.T) {
	n, entry, kek := holding(t, "cp-1", alone(t), nil), onTPM(t, "cp-2"), newKEK(t)
	defer kek.Close()
	cluster := seal.ClusterID{1}
	states := []keyring.RecordedState{booted("1"), booted("2")}
	slots, err := wrapFor(t.Context(), n, entry, cluster, kek, states)
	if err != nil || len(slots) != 2 || slices.ContainsFunc(slots, func(s seal.Slot) bool { return s.Node != "cp-2" || s.Type != seal.TypeTPM }) {
		t.Fatalf("%+v, %v", slots, err)
	}
	if got := wrappedFor(t, entry, slots, cluster); !slices.EqualFunc(got, states, sameState) {
		t.Errorf("wrapped for %+v, want %+v", got, states)
	}
	if all, err := wrapFor(t.Context(), n, entry, cluster, kek, nil); err != nil || len(all) != 0 {
		t.Errorf("without a boot state: %+v, %v", all, err)
	}
	noBank, second := booted("3"), booted("3")
	noBank.Bank, second.Second = "md5", seal.TypeVault
	noIndex, noSRK := entry, entry
	noIndex.EpochIndex, noSRK.SRK = 1, []byte("no key")
	for what, row := range map[string]struct {
		entry keyring.Node
		state keyring.RecordedState
		says  string
	}{
		"an unknown bank":  {entry, noBank, "its record: "},
		"no such wrapper":  {entry, second, "this node has no vault"},
		"no epoch counter": {noIndex, booted("3"), "index"},
		"no SRK":           {noSRK, booted("3"), "storage root key"},
	} {
		if all, err := wrapFor(t.Context(), n, row.entry, cluster, kek, append(states, row.state)); err == nil || !strings.Contains(err.Error(), row.says) || len(all) != 0 {
			t.Errorf("%s: %d slots, %v", what, len(all), err)
		}
	}
}

// TestWrapAnew: a node that boots in another way than when the KEK was staged is given a
// slot for the new boot state, once, if the rotation waits for that node.
func TestWrapAnew(t *testing.T) {
	shared, entry := &storetest.Memory{}, onTPM(t, "cp-2")
	k, err := alone(t).WithNode(entry, time.Now())
	must(t, k, err)
	first, second := holding(t, "cp-1", k, shared), holding(t, "cp-2", k, shared)
	boots := func(states ...keyring.RecordedState) { // it restarts
		second.Replica = replica.New(replica.Config{
			Store: shared, Unlocker: second.Unlocker, Log: slog.New(slog.DiscardHandler),
			Wrap:       func(context.Context, *keyring.Keyring, *seal.Secret) ([]seal.Slot, error) { return nil, nil },
			BootStates: func(context.Context, *keyring.Keyring) ([]keyring.RecordedState, error) { return states, nil },
		})
		for range 2 {
			_ = second.Replica.Sync(t.Context()) // it can't open the staged KEK, and writes its record
			_ = first.Replica.Sync(t.Context())
		}
		if _, err := first.Replica.Reports(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	boots(booted("1"))
	_, err = Start(t.Context(), first, Options{Shared: func(context.Context, *keyring.Keyring) (rotation.Wrap, error) {
		return func(context.Context, *seal.Secret) ([]seal.Slot, error) { return recoverySlots, nil }, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	present := func() *keyring.Keyring {
		t.Helper()
		k, err := first.Unlocker.Keyring()
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	wrapped := func(what string, k *keyring.Keyring, missing []rotation.Missing, want ...keyring.RecordedState) {
		t.Helper()
		if err := wrapAnew(t.Context(), first, k, missing); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if got := wrappedFor(t, entry, present().StagedSlots(), k.ClusterID()); !slices.EqualFunc(got, want, sameState) {
			t.Errorf("%s: wrapped for %+v, want %+v", what, got, want)
		}
	}
	missing := []rotation.Missing{{Node: "cp-2"}}
	staged := present()
	wrapped("it boots as before", staged, missing, booted("1"))
	boots(booted("1"), booted("2"))
	staged = present()
	wrapped("nobody waits for it", staged, nil, booted("1"))
	wrapped("without a staged KEK", k, missing, booted("1"))
	wrapped("it boots in another way", staged, missing, booted("1"), booted("2"))
	if err := wrapAnew(t.Context(), first, staged, missing); err == nil || !strings.Contains(err.Error(), "changed meanwhile") {
		t.Errorf("the keyring has changed since: %v", err)
	}
	boots(booted("1"), booted("2"))
	revision := present().Revision()
	wrapped("it has a slot for each boot", present(), missing, booted("1"), booted("2"))
	if now := present().Revision(); now != revision {
		t.Errorf("revision %d follows %d without a reason", now, revision)
	}
}
