package rollout

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/replica/storetest"
)

// onPlugin returns the nodes cp-1 and cp-2 of one keyring, in step with a cluster store. The
// same plugin opens the keyring on both.
func onPlugin(t *testing.T) (first, second *node.Node) {
	t.Helper()
	p, s := nodetest.NewPlugin(t), &storetest.Memory{}
	newNode := func(name string) *node.Node {
		n := nodetest.New(t, nodetest.Named(name), p.Opens, func(c *config.Config) { c.Cluster.Kubeconfig = "/unused" })
		noSlots := func(context.Context, *keyring.Keyring, *seal.Secret) ([]seal.Slot, error) { return nil, nil }
		n.Replica = replica.New(replica.Config{Store: s, Unlocker: n.Unlocker, Wrap: noSlots, Log: slog.New(slog.DiscardHandler)})
		return n
	}
	first, second = newNode("cp-1"), newNode("cp-2")
	k := pair(t)
	_, recipient := nodetest.Identity(t)
	w, err := recovery.NewWrapper(seal.Memory{}, []string{recipient})
	if err != nil {
		t.Fatal(err)
	}
	var slots []seal.Slot
	for _, w := range []seal.Wrapper{first.KMSPlugin, w} {
		slot, err := w.Wrap(t.Context(), k.KEK())
		if err != nil {
			t.Fatal(err)
		}
		slots = append(slots, slot)
	}
	shared, err := k.WithSlots(slots)
	must(t, shared, err)
	for _, n := range []*node.Node{first, second} {
		nodetest.Hold(t, n, shared)
		if err := n.Unlocker.Unlock(t.Context()); err != nil { // Run waits for the first attempt
			t.Fatal(err)
		}
	}
	for _, n := range []*node.Node{first, second, first, second} {
		if err := n.Replica.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	return first, second
}

// TestDrive: while the nodes run, a rotation goes from the staged KEK to the current one on
// its own, and every node retires the former one.
func TestDrive(t *testing.T) {
	first, second := onPlugin(t)
	log := &nodetest.Log{}
	first.Log = slog.New(log)
	former, err := first.Unlocker.CurrentID()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	running.Go(func() { Drive(ctx, first) })
	for _, n := range []*node.Node{first, second} {
		running.Go(func() { n.Replica.Run(ctx) })
	}
	s, err := Rotate(ctx, first, admin.RotateRequest{})
	if err != nil || s.Rotation == nil {
		t.Fatalf("%+v, %v", s, err)
	}
	for _, n := range []*node.Node{first, second} {
		for {
			round := n.Replica.Round()
			k, err := n.Unlocker.Keyring()
			if err != nil {
				t.Fatal(err)
			}
			if k.CurrentID() != former && k.StagedID() == "" {
				if !k.Holds(former) {
					t.Errorf("%s lost the former KEK", n.Config.Node)
				}
				break
			}
			select {
			case <-round:
			case <-ctx.Done():
				t.Fatalf("%s is still at %+v; the log: %q", n.Config.Node, k.Info(), log.Lines())
			}
		}
	}
	one, err := first.Unlocker.CurrentID()
	two, err2 := second.Unlocker.CurrentID()
	if err != nil || err2 != nil || one != two {
		t.Errorf("%s and %s: %v, %v", one, two, err, err2)
	}
	const said = "rotation: every node has the fresh KEK, which is current now"
	for log.Count(said) == 0 && ctx.Err() == nil { // it is said after the KEK can be seen
		time.Sleep(5 * time.Millisecond)
	}
	if log.Count(said) != 1 {
		t.Errorf("%q", log.Lines())
	}
}

// TestWhoWon: if another node has staged its KEK first, that is the reason for a failure
// here. Without such a rotation, and for this node's own, the failure stays as it was.
func TestWhoWon(t *testing.T) {
	first, second := onPlugin(t)
	failed := errors.New("conflict")
	if err := whoWon(t.Context(), second, failed); err != failed {
		t.Errorf("without a rotation: %v", err)
	}
	if _, err := Start(t.Context(), first, Options{}); err != nil {
		t.Fatal(err)
	}
	if err := whoWon(t.Context(), second, failed); err == nil || !strings.Contains(err.Error(), "another rotation is going on") || !strings.Contains(err.Error(), "cp-1") {
		t.Errorf("after another node's: %v", err)
	}
	if err := whoWon(t.Context(), first, failed); err != failed {
		t.Errorf("after its own: %v", err)
	}
}
