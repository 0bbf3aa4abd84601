package replica_test

import (
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// evil returns the keyring that a former node, which knows k's KEK, makes of k: a far
// later revision under a KEK of its own.
func evil(t *testing.T, k *keyring.Keyring) []byte {
	t.Helper()
	kek, err := seal.Memory{}.NewKEK()
	must(t, err)
	k, err = k.Stage(kek, nil, now)
	must(t, err)
	k, err = k.WithOwnSlots(k.OwnSlots(), k.OwnSlots())
	must(t, err)
	k, err = k.Activate(now)
	must(t, err)
	k, err = k.AtLeast(1000)
	must(t, err)
	return k.Shared()
}

// TestRemovedNodeForges: a removed node makes a keyring with its old KEK and plants it in
// the store. No node announces that keyring or opens it, neither while all anchors name
// the old KEK nor after they have moved.
func TestRemovedNodeForges(t *testing.T) {
	c := open(t)
	intruder := c.nodes[2].keyring()
	forgeries := map[string][]byte{"its own KEK": evil(t, intruder)}
	next, err := intruder.AtLeast(1000)
	must(t, err)
	forgeries["the KEK that it knew"] = next.Shared()
	refused := func(when, what string, forged []byte) {
		t.Helper()
		good, err := c.store.Load(ctx)
		must(t, err)
		must(t, c.store.Swap(ctx, good, forged))
		for _, n := range c.nodes[:2] {
			before, file := n.keyring().CurrentID(), string(n.file.b)
			if err := n.Sync(ctx); err == nil || n.keyring().CurrentID() != before || string(n.file.b) != file {
				t.Errorf("%s, %s: node %s takes it: %v", when, what, n.name, err)
			}
			n.start()
			if got := n.keyring().CurrentID(); got != before {
				t.Errorf("%s, %s: node %s starts with %s", when, what, n.name, got)
			}
		}
		must(t, c.store.Swap(ctx, forged, good))
	}
	refused("before", "its own KEK", forgeries["its own KEK"])

	must(t, c.nodes[0].Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := k.WithoutNode("c")
		return []*keyring.Keyring{next}, err
	}))
	c.nodes = c.nodes[:2]
	c.settle(t)
	refused("dropped", "its own KEK", forgeries["its own KEK"])
	if former := c.nodes[1].keyring().Info().Former; len(former) != 1 || former[0] != "c" {
		t.Errorf("former nodes: %q", former)
	}
	c.rotate(t, 1)
	c.settle(t)
	if former := c.nodes[0].keyring().Info().Former; len(former) != 0 {
		t.Errorf("former nodes after the rotation: %q", former)
	}
	for what, forged := range forgeries {
		refused("anchors moved", what, forged)
	}
	c.settle(t)
}

// TestNewTPMBreaksOff: a node changes its own entry, for another TPM, and dies before it has
// stored the keyring. It is not removed: the machine that the store lists is this one.
func TestNewTPMBreaksOff(t *testing.T) {
	c := open(t)
	a := c.nodes[0]
	former, _ := a.keyring().Self()
	self := former
	self.EK, self.SRK = "sha256:"+strings.Repeat("9", 64), []byte("another SRK")
	newTPM := func() error {
		return a.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
			next, err := k.WithNode(self, now)
			return []*keyring.Keyring{next}, err
		})
	}
	a.file.dies = true
	if err := newTPM(); err == nil {
		t.Fatal("the node lives on")
	}
	for _, machine := range []keyring.Node{former, {Name: "a"}} { // another machine has taken the node's place
		a.machine = machine
		a.start()
		if err := a.Sync(ctx); seal.CauseOf(err) != seal.CauseNodeRemoved {
			t.Errorf("as %+v: %v", machine, err)
		}
		must(t, a.removal.Remove(ctx))
	}
	a.machine = self
	a.start()
	a.file.dies = true // a disk that is full, say
	if err := a.Sync(ctx); err == nil || seal.CauseOf(err) == seal.CauseNodeRemoved || a.removal.b != nil {
		t.Errorf("without a place for the keyring: %v", err)
	}
	a.start()
	must(t, a.Sync(ctx))
	if now, _ := a.keyring().Self(); !now.SameTPM(self) || a.removal.b != nil {
		t.Errorf("%+v", now)
	}
	for _, n := range c.nodes {
		must(t, n.Sync(ctx))
	}
	must(t, newTPM())
}
