package replica_test

import (
	"errors"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

// carry brings the export of node from to node to, which has no access to the store.
func (c *cluster) carry(t *testing.T, from, to int) error {
	t.Helper()
	shared, _, err := c.nodes[from].Export(ctx)
	must(t, err)
	remote, err := keyring.Parse(shared)
	must(t, err)
	_, err = c.nodes[to].Import(ctx, remote)
	return err
}

// back puts the record of node from into the store, as node to does when it imports.
func (c *cluster) back(t *testing.T, from, to int) {
	t.Helper()
	_, record, err := c.nodes[from].Export(ctx)
	must(t, err)
	u, err := keyring.ParseRecord(record)
	must(t, err)
	_, err = u.Verify(c.nodes[to].keyring())
	must(t, err)
	must(t, c.nodes[to].PutRecord(ctx, u.Node(), record))
}

// TestCarried: a node without access to the store takes part in a rotation by files. The
// KEK becomes current only once the node's acknowledgement was carried back.
func TestCarried(t *testing.T) {
	c := newCluster(t)
	t.Cleanup(c.close)
	sync := func() {
		for _, n := range c.nodes[:2] {
			must(t, n.Sync(ctx))
		}
	}
	advance := func(want rotation.Action) {
		t.Helper()
		sync()
		if s, err := c.nodes[0].driver().Advance(ctx, c.nodes[0].keyring().CurrentID()); err != nil || s.Do != want {
			t.Fatalf("%+v, %v, want %s", s, err, want)
		}
		sync()
	}
	sync()
	advance(rotation.Wait) // for the record of c
	must(t, c.carry(t, 0, 2))
	c.back(t, 2, 1)
	former := c.nodes[0].keyring().CurrentID()
	advance(rotation.Stage)
	advance(rotation.Wait)
	must(t, c.carry(t, 1, 2))
	if k := c.nodes[2].keyring(); !k.Acknowledged() || k.CurrentID() != former {
		t.Errorf("the node without access: %+v", k.Info())
	}
	c.back(t, 2, 0)
	advance(rotation.Activate)
	if id := c.nodes[2].keyring().CurrentID(); id != former {
		t.Errorf("the node without access is under %s", id)
	}
	must(t, c.carry(t, 0, 2))
	c.nodes[2].start()
	for _, n := range c.nodes {
		if k := n.keyring(); k.CurrentID() == former || !k.Holds(former) {
			t.Errorf("node %s: %+v", n.name, k.Info())
		}
	}
}

// TestCarriedForgery: a carried file is judged by the same rules as the store.
func TestCarriedForgery(t *testing.T) {
	c := open(t)
	n := c.nodes[2]
	before := n.file.b
	older, err := keyring.Parse(n.keyring().Shared())
	must(t, err)
	must(t, c.nodes[0].change())
	must(t, c.carry(t, 0, 2))
	if _, err := n.Import(ctx, older); !errors.Is(err, keyring.ErrOlder) {
		t.Errorf("an older keyring: %v", err)
	}
	must(t, c.nodes[0].Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := k.WithoutNode("c")
		return []*keyring.Keyring{next}, err
	}))
	if err := c.carry(t, 0, 2); seal.CauseOf(err) != seal.CauseNodeRemoved {
		t.Errorf("a keyring that does not list the node: %v", err)
	}
	if _, err := n.Unlocker.Keyring(); err != nil {
		t.Errorf("the node is locked: %v", err)
	}
	if string(n.file.b) == string(before) {
		t.Error("the newer keyring was not saved")
	}
}
