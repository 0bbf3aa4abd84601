package replica_test

import (
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

// forked returns a cluster in which node a has activated a KEK that all nodes acknowledged, and
// after a restore of the store b has aborted that rotation, and c has followed.
func forked(t *testing.T) (c *cluster, former, fresh seal.KeyID) {
	t.Helper()
	c = open(t)
	a, b := c.nodes[0], c.nodes[1]
	former = a.keyring().CurrentID()
	if s, err := a.driver().Advance(ctx, former); err != nil || s.Do != rotation.Stage {
		t.Fatalf("%+v, %v", s, err)
	}
	c.settle(t)
	restore := c.store.Snapshot()
	if s, err := a.driver().Advance(ctx, former); err != nil || s.Do != rotation.Activate {
		t.Fatalf("%+v, %v", s, err)
	}
	restore()
	must(t, b.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := k.Abort(now)
		return []*keyring.Keyring{next}, err
	}))
	must(t, c.nodes[2].Sync(ctx))
	fresh = a.keyring().CurrentID()
	if err := a.Sync(ctx); seal.CauseOf(err) != seal.CauseForked {
		t.Fatalf("no fork: %v", err)
	}
	return c, former, fresh
}

// take has node to import the export of node from, with an operator's word.
func (c *cluster) take(t *testing.T, from, to int, trusted seal.KeyID) error {
	t.Helper()
	shared, _, err := c.nodes[from].Export(ctx)
	must(t, err)
	remote, err := keyring.Parse(shared)
	must(t, err)
	return c.nodes[to].ImportTrusted(ctx, seal.Memory{}, remote, trusted)
}

func (c *cluster) whole(t *testing.T, current seal.KeyID, all ...seal.KeyID) {
	t.Helper()
	c.settle(t)
	for _, n := range c.nodes {
		n.start()
		k := n.keyring()
		for _, id := range all {
			if k.CurrentID() != current || !k.Holds(id) {
				t.Errorf("node %s: current %s, want %s; holds %s: %v", n.name, k.CurrentID(), current, id, k.Holds(id))
			}
		}
	}
	c.rotate(t, 1)
}

// TestPublishFork: an operator keeps either side of a fork; no KEK is forgotten.
func TestPublishFork(t *testing.T) {
	t.Run("the one beside the store", func(t *testing.T) {
		c, former, fresh := forked(t)
		must(t, c.nodes[0].Publish(ctx, seal.Memory{}, false))
		for _, i := range []int{1, 2} {
			if err := c.nodes[i].Sync(ctx); seal.CauseOf(err) != seal.CauseForked {
				t.Errorf("a node follows by itself: %v", err)
			}
			if err := c.take(t, 0, i, former); err == nil {
				t.Error("another KEK is trusted than the operator says")
			}
			must(t, c.take(t, 0, i, fresh))
		}
		c.whole(t, fresh, former, fresh)
	})
	t.Run("the one in the store", func(t *testing.T) {
		c, former, fresh := forked(t)
		if err := c.take(t, 1, 0, former); seal.CauseOf(err) != seal.CauseForked {
			t.Errorf("one of the same revision: %v", err)
		}
		must(t, c.nodes[1].Publish(ctx, seal.Memory{}, false))
		must(t, c.take(t, 1, 0, former))
		must(t, c.nodes[2].Sync(ctx))
		c.whole(t, former, former, fresh)
	})
}

// TestPublishAbsorbs: the KEK that only the other keyring has staged is retired, not
// lost.
func TestPublishAbsorbs(t *testing.T) {
	c := open(t)
	a, b := c.nodes[0], c.nodes[1]
	restore := c.store.Snapshot()
	must(t, a.change())
	restore()
	former := b.keyring().CurrentID()
	if s, err := b.driver().Advance(ctx, former); err != nil || s.Do != rotation.Stage {
		t.Fatalf("%+v, %v", s, err)
	}
	staged := b.keyring().StagedID()
	if err := a.Sync(ctx); seal.CauseOf(err) != seal.CauseForked {
		t.Fatalf("no fork: %v", err)
	}
	must(t, a.Publish(ctx, seal.Memory{}, false))
	c.whole(t, former, former, staged)
}

// TestPublishDiscards: a keyring that no node takes is replaced only by an operator's
// word, and none of its KEKs are taken over.
func TestPublishDiscards(t *testing.T) {
	for what, planted := range map[string]func(c *cluster) []byte{
		"damaged": func(*cluster) []byte { return []byte("{}\n") },
		"unknown": func(c *cluster) []byte { return evil(t, c.nodes[2].keyring()) },
	} {
		c := open(t)
		good, err := c.store.Load(ctx)
		must(t, err)
		bad := planted(c)
		must(t, c.store.Swap(ctx, good, bad))
		current, n := c.nodes[0].keyring().CurrentID(), c.nodes[0]
		if err := n.Publish(ctx, seal.Memory{}, false); err == nil {
			t.Errorf("%s: it is absorbed", what)
		}
		must(t, n.Publish(ctx, seal.Memory{}, true))
		if k := n.keyring(); k.CurrentID() != current || len(k.Info().Retired) != 0 || k.Revision() > 100 {
			t.Errorf("%s: %+v", what, k.Info())
		}
		c.whole(t, current, current)
	}
}
