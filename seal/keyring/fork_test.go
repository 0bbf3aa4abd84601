package keyring

import (
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// readsAll demands that k decrypts what each of the keyrings encrypts.
func readsAll(t *testing.T, k *Keyring, all map[string]*Keyring) {
	t.Helper()
	for name, of := range all {
		c, id, err := of.Encrypt([]byte(name))
		if err != nil {
			t.Fatal(err)
		}
		if p, err := k.Decrypt(id, c); err != nil || string(p) != name {
			t.Errorf("%s: %q, %v", name, p, err)
		}
	}
}

// TestAbsorbNamesHolders: a machine that became a node, or was removed, in the other half of a
// fork knows the KEKs of that half. The kept keyring names it until none of these is current.
func TestAbsorbNamesHolders(t *testing.T) {
	ok := must[*Keyring](t)
	a, _ := cluster2(t)
	joined := ok(a.WithNode(entry("cp-4", "d"), now))
	both := ok(ok(joined.WithNode(Node{Name: "cp-5"}, now)).WithoutNode("cp-5"))
	staged := acknowledge(t, ok(a.Stage(newKEK(t, 60), imports(), now)), 60)
	ahead := rotate2(t, joined, 60) // with the KEK that is staged in the other half
	cleared := entry("cp-4", "d")
	cleared.SRK = []byte("cleared")
	for name, c := range map[string]struct {
		k, other *Keyring
		former   []string
		aborts   bool
	}{
		"it joined there":               {k: a, other: joined, former: []string{"cp-4"}},
		"another was removed there":     {k: a, other: both, former: []string{"cp-4", "cp-5"}},
		"nobody joined there":           {k: a, other: ok(a.AtLeast(9))},
		"the same machine, cleared":     {k: ok(a.WithNode(cleared, now)), other: joined},
		"another machine of that name":  {k: ok(a.WithNode(entry("cp-4", "e"), now)), other: joined, former: []string{"cp-4"}},
		"it never knew the kept KEK":    {k: rotate2(t, a, 70), other: joined},
		"the kept half was left behind": {k: a, other: ahead, former: []string{"cp-4"}},
		"it never knew the staged KEK":  {k: staged, other: joined, former: []string{"cp-4"}},
		"it knows the staged KEK":       {k: staged, other: ahead, former: []string{"cp-4"}, aborts: true},
		"all who know it are listed":    {k: staged, other: rotate2(t, a, 60)},
	} {
		other := c.other // read from the store, as Publish does
		if other.StagedID() == "" && c.k.Holds(other.CurrentID()) {
			other = ok(OpenHeld(c.k, published(t, other), seal.Memory{}))
		}
		next := ok(Absorb(c.k, other, now))
		if i := next.Info(); !slices.Equal(i.Former, c.former) || (i.Staged == nil) != (c.k.StagedID() == "" || c.aborts) || next.Revision() <= c.other.Revision() || next.CurrentID() != c.k.CurrentID() {
			t.Errorf("%s: former %q, staged %v, revision %d", name, i.Former, i.Staged, i.Revision)
		}
		readsAll(t, next, map[string]*Keyring{"kept": c.k, "the other": c.other})
	}
	closed := reopen(t, staged, newKEK(t, 1), nil)
	if _, err := Absorb(closed, ahead, now); err == nil || !strings.Contains(err.Error(), "node cp-4, which only the other keyring names, may know the staged KEK") {
		t.Errorf("not open: %v", err)
	}
}

// TestAbsorb: the revision that ends a fork comes after both keyrings, however far the other
// one is ahead, and no KEK of either is lost. The nodes with the other keyring take it, if an
// operator vouches for its KEK.
func TestAbsorb(t *testing.T) {
	ok := must[*Keyring](t)
	a, b := cluster2(t)
	staged := acknowledge(t, ok(a.Stage(newKEK(t, 60), imports(), now)), 60)
	b = acknowledge(t, ok(b.Follow(published(t, staged), nil)), 60)
	kept := ok(staged.Activate(now))                        // one half activates
	other := ok(ok(b.Abort(now)).AtLeast(1000))             // the other one aborts, and goes on
	other = rotate2(t, other, 100)                          // with a KEK that only this half holds
	other = ok(other.Stage(newKEK(t, 140), imports(), now)) // and with another one
	before := len(kept.Info().Retired)

	absorbed := ok(Absorb(kept, other, now))
	if absorbed.Revision() <= other.Revision() || absorbed.CurrentID() != kept.CurrentID() || len(kept.Info().Retired) != before {
		t.Errorf("revision %d after %d, key ID %s", absorbed.Revision(), other.Revision(), absorbed.CurrentID())
	}
	retired := absorbed.Info().Retired
	if last := retired[len(retired)-1]; len(retired) != 3 || last.KeyID != other.StagedID() || !last.Unused {
		t.Errorf("retired: %+v", retired)
	}
	anchor := absorbed.Anchor()
	readsAll(t, reopen(t, absorbed, newKEK(t, 60), &anchor), map[string]*Keyring{"the first": a, "kept": kept, "the other": other})

	if again := ok(Absorb(absorbed, other, now)); len(again.Info().Retired) != 3 {
		t.Errorf("absorbed twice: %+v", again.Info().Retired)
	}
	// A staged KEK that is not open can't be kept, unless it is here already.
	closed := reopen(t, other, newKEK(t, 100), nil)
	if _, err := Absorb(kept, closed, now); err == nil || !strings.Contains(err.Error(), "is not open here") {
		t.Errorf("a KEK is forgotten: %v", err)
	}
	if _, err := Absorb(absorbed, closed, now); err != nil {
		t.Errorf("its staged KEK is retired here: %v", err)
	}

	// The other half takes it: its nodes acknowledged the KEK before they aborted.
	if _, err := FollowTrusted(other, published(t, absorbed), kept.CurrentID(), seal.Memory{}); err != nil {
		t.Errorf("the other half: %v", err)
	}
	if err := Follows(other, published(t, absorbed)); err == nil {
		t.Error("nobody vouches for it, and it is followed")
	}
	for name, c := range map[string]struct {
		k       *Keyring
		remote  *Untrusted
		trusted seal.KeyID
		words   string
	}{
		"another KEK is vouched for":    {other, published(t, absorbed), a.CurrentID(), "is to be trusted"},
		"its KEK was never held":        {a, published(t, absorbed), kept.CurrentID(), "which this node does not hold"},
		"it is older than the node's":   {other, published(t, kept), kept.CurrentID(), ErrOlder.Error()},
		"it does not list the node":     {other, published(t, ok(absorbed.WithoutNode("cp-2"))), kept.CurrentID(), "does not hold this node"},
		"it forgets the node's own KEK": {other, published(t, ok(kept.AtLeast(5000))), kept.CurrentID(), "key ID"},
	} {
		if _, err := FollowTrusted(c.k, c.remote, c.trusted, seal.Memory{}); err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestFollowStaged: a node that follows keeps the staged KEK open as long as that very KEK is
// staged. A KEK that was staged in its place is not open.
func TestFollowStaged(t *testing.T) {
	ok := must[*Keyring](t)
	a, b := cluster2(t)
	staged := ok(a.Stage(newKEK(t, 60), imports(), now))
	b = acknowledge(t, ok(b.Follow(published(t, staged), nil)), 60)
	b = ok(b.Follow(published(t, ok(WithStagedSlots(staged, sharedSlots("more")))), nil))
	if !b.Holds(staged.StagedID()) || StagedKEK(b) == nil || !b.Acknowledged() {
		t.Error("a revision with the same staged KEK closes the KEK")
	}
	another := ok(ok(staged.Abort(now)).Stage(newKEK(t, 100), imports(), now))
	b = ok(b.Follow(published(t, another), nil))
	if b.Holds(another.StagedID()) || StagedKEK(b) != nil || b.Acknowledged() {
		t.Error("the former staged KEK stands for the present one")
	}
	readsAll(t, b, map[string]*Keyring{"the current KEK": another})
	// To ask whether to follow keeps nothing open.
	b = reopen(t, b, newKEK(t, 1), nil) // which shares no KEK with the keyrings above
	kek, size := b.kek.secret, 0
	if err := Follows(b, published(t, ok(another.AtLeast(50)))); err != nil {
		t.Error(err)
	}
	b.Close()
	kek.With(func(open []byte) { size = len(open) })
	if size != 0 {
		t.Error("Follows keeps the KEK open")
	}
}

// TestCheckSeat: without a cluster store only the seat revises the keyring of several nodes.
func TestCheckSeat(t *testing.T) {
	ok := must[*Keyring](t)
	alone := ok(New(cluster, newKEK(t, 1), append(tpmSlots("cp-1", "one"), sharedSlots("one")...), nodes, now))
	upgraded := ok(alone.Upgrade(entry("cp-1", "a")))
	two := ok(upgraded.WithNode(entry("cp-2", "b"), now))
	elsewhere := func(k *Keyring, node string) *Keyring {
		return ok(ok(open(k.Shared(), newKEK(t, 1), nil)).OnNode(node, tpmSlots(node, "own"), nil))
	}
	inCluster := ok(two.InCluster())
	for name, c := range map[string]struct {
		k    *Keyring
		want bool
	}{
		"format 1": {alone, true}, "one node": {upgraded, true}, "the seat": {two, true}, "another node": {elsewhere(two, "cp-2"), false},
		"nobody knows which": {ok(open(two.Shared(), newKEK(t, 1), nil)), false}, "in the cluster store": {elsewhere(inCluster, "cp-2"), true},
	} {
		if err := CheckSeat(c.k); (err == nil) != c.want || err != nil && !strings.Contains(err.Error(), "only node cp-1") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestCheckNode: an entry for a node that is to join has a name and an endorsement key, or no
// TPM.
func TestCheckNode(t *testing.T) {
	ek := "sha256:" + strings.Repeat("0a", 32)
	for name, c := range map[string]struct {
		node Node
		want bool
	}{
		"a TPM": {Node{Name: "cp-2", EK: ek}, true}, "no TPM": {Node{Name: "cp-2"}, true}, "a listed one": {entry("cp-2", "b"), true},
		"no name": {Node{EK: ek}, false}, "a path": {Node{Name: "../x", EK: ek}, false}, "upper case": {Node{Name: "cp-2", EK: strings.ToUpper(ek)}, false},
		"a short key": {Node{Name: "cp-2", EK: ek[:70]}, false}, "an epoch without a storage root key": {Node{Name: "cp-2", EK: ek, EpochIndex: 7}, false},
	} {
		if err := c.node.Check(); (err == nil) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}
