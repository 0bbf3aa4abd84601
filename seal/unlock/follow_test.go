package unlock_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// entryOf returns the entry of a node without a TPM.
func entryOf(name string) keyring.Node { return keyring.Node{Name: name} }

// ok returns k, and closes it at the end of the test.
func (n *node) ok(k *keyring.Keyring, err error) *keyring.Keyring {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(k.Close)
	return k
}

func (n *node) kek() *seal.Secret {
	n.t.Helper()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		n.t.Fatal(err)
	}
	return kek
}

func (n *node) published(k *keyring.Keyring) *keyring.Untrusted {
	n.t.Helper()
	u, err := keyring.Parse(k.Shared())
	if err != nil {
		n.t.Fatal(err)
	}
	return u
}

// pair returns one of two nodes, open, and the keyring of the other one.
func pair(t *testing.T) (*node, *keyring.Keyring) {
	t.Helper()
	n := newNode(t)
	kek := n.kek()
	shared := []seal.Slot{n.wrapper.slot(kek, "shared")}
	own := n.wrapper.slot(kek, "own")
	own.Node = "b"
	a := n.ok(keyring.New(seal.ClusterID{1}, kek, shared, []keyring.Node{entryOf("a")}, now))
	a = n.ok(n.ok(n.ok(a.Upgrade(entryOf("a"))).WithNode(entryOf("b"), now)).InCluster())
	b := n.ok(a.OnNode("b", []seal.Slot{own}, nil))
	n.put(b.Marshal())
	if err := n.anchor.Save(ctx, b.Anchor()); err != nil {
		t.Fatal(err)
	}
	n.mustOpen()
	return n, a
}

// TestFollow: this node follows a rotation that another node drives. Only the staged KEK
// takes the gate and a slot. Each step is saved and anchored before it is announced.
func TestFollow(t *testing.T) {
	n, a := pair(t)
	former := n.encrypt()
	next := n.kek()
	staged := n.ok(a.Stage(next, []seal.Slot{n.wrapper.slot(next, "staged")}, now))
	if err := n.Follow(ctx, n.published(staged), nil); err != nil {
		t.Fatal(err)
	}
	wantSteps(t, n.steps.take(), "save", "anchor 5", "settle while k1-"+string(former.id[3:8])+" is announced")
	if err := n.Follow(ctx, n.published(staged), nil); err != keyring.ErrInStep {
		t.Error(err)
	}
	n.gate.set(seal.Errorf(seal.CauseBootPolicy, "x", "another boot"))
	wantRefusal(t, n.OpenStaged(ctx), seal.CauseBootPolicy, "another boot")
	wantRefusal(t, n.State().Staged, seal.CauseBootPolicy, "another boot")
	n.decrypts(former)
	n.gate.set(nil)
	n.steps.take()
	if err := n.OpenStaged(ctx); err != nil {
		t.Fatal(err)
	}
	wantSteps(t, n.steps.take(), "gate", "slot tpmstaged")
	if err := n.OpenStaged(ctx); err != nil || n.State().Staged != nil {
		t.Error(err)
	}
	wantSteps(t, n.steps.take())
	active := n.ok(staged.Activate(now))
	if err := n.Follow(ctx, n.published(active), nil); seal.CauseOf(err) != seal.CauseAnchor {
		t.Errorf("a KEK that this node has not acknowledged: %v", err)
	}
	own := n.wrapper.slot(next, "own")
	own.Node = "b"
	if err := n.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		kept, err := k.WithOwnSlots(k.OwnSlots(), []seal.Slot{own})
		return []*keyring.Keyring{kept}, err
	}); err != nil {
		t.Fatal(err)
	}
	n.steps.take()
	if err := n.Follow(ctx, n.published(active), nil); err != nil {
		t.Fatal(err)
	}
	wantSteps(t, n.steps.take(), "save", "anchor 6", "settle while k1-"+string(former.id[3:8])+" is announced")
	if id, _ := n.CurrentID(); id != active.CurrentID() {
		t.Errorf("current is %s", id)
	}
	n.decrypts(former)
	n.restart()
	n.mustOpen()
	n.decrypts(former)
	n.decrypts(n.encrypt())
	if k, _ := n.Keyring(); len(k.OwnSlots()) != 1 || !bytes.Equal(k.Shared(), active.Shared()) {
		t.Errorf("%+v", k.Info())
	}
}

// TestFollowThatFails: a Follow that fails changes neither the open nor the stored
// keyring.
func TestFollowThatFails(t *testing.T) {
	n, a := pair(t)
	e, before := n.encrypt(), n.read("keyring.json")
	removed := n.ok(a.WithNode(entryOf("c"), now))
	for what, c := range map[string]struct {
		remote *keyring.Keyring
		fault  error
		want   seal.Cause
	}{
		"refused":      {n.ok(n.ok(a.WithoutNode("b")).WithNode(entryOf("c"), now)), nil, seal.CauseNodeRemoved},
		"no disk left": {removed, errors.New("no space left on device"), seal.CauseStore},
	} {
		n.store.saves.set(c.fault)
		if err := n.Follow(ctx, n.published(c.remote), nil); seal.CauseOf(err) != c.want {
			t.Errorf("%s: %v", what, err)
		}
		n.store.saves.set(nil)
		if !bytes.Equal(n.read("keyring.json"), before) {
			t.Errorf("%s: the file has changed", what)
		}
		if id, err := n.CurrentID(); id != e.id || err != nil {
			t.Errorf("%s: %s, %v", what, id, err)
		}
		n.decrypts(e)
	}
	locked := newNode(t)
	locked.make()
	wantRefusal(t, locked.Follow(ctx, n.published(a), nil), seal.CauseStarting)
	wantRefusal(t, locked.OpenStaged(ctx), seal.CauseStarting)
}
