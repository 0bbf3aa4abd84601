package keyring

import (
	"bytes"
	"errors"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// published returns the shared part of a keyring, as the cluster store holds it.
func published(t testing.TB, k *Keyring) *Untrusted {
	t.Helper()
	return must[*Untrusted](t)(Parse(k.Shared()))
}

// imports are staged slots for both nodes of cluster2, and a shared one.
func imports() []seal.Slot {
	return append(append(tpmSlots("cp-1", "i1"), tpmSlots("cp-2", "i2")...), sharedSlots("s")...)
}

// acknowledge opens the staged KEK on a node and gives it slots of the node's own.
func acknowledge(t testing.TB, k *Keyring, first byte) *Keyring {
	t.Helper()
	ok := must[*Keyring](t)
	self, _ := k.Self()
	if !k.Holds(k.StagedID()) {
		k = ok(k.OpenStaged(newKEK(t, first)))
	}
	return ok(k.WithOwnSlots(k.OwnSlots(), tpmSlots(self.Name, "sealed")))
}

// TestFollow takes a node through a rotation that another node drives. The node opens a
// slot only for the staged KEK.
func TestFollow(t *testing.T) {
	ok := must[*Keyring](t)
	a, b := cluster2(t)
	c, id, err := a.Encrypt([]byte("old"))
	if err != nil {
		t.Fatal(err)
	}
	follow := func(k *Keyring, of *Keyring) *Keyring {
		t.Helper()
		next := ok(k.Follow(published(t, of), nil))
		if !bytes.Equal(next.Shared(), of.Shared()) {
			t.Error("it is not the keyring that was published")
		}
		self, _ := k.Self()
		if now, _ := next.Self(); now.Name != self.Name {
			t.Errorf("the node was %s and is %s", self.Name, now.Name)
		}
		return next
	}
	staged := acknowledge(t, ok(a.Stage(newKEK(t, 60), imports(), now)), 60)
	b = follow(b, staged)
	if names(b.Slots()) != "two|one" || b.Holds(b.StagedID()) || b.Acknowledged() {
		t.Errorf("slots %q", names(b.Slots()))
	}
	b = acknowledge(t, b, 60)
	active := ok(staged.Activate(now))
	fresh, freshID, err := active.Encrypt([]byte("new"))
	if err != nil {
		t.Fatal(err)
	}
	if p, err := b.Decrypt(freshID, fresh); err != nil || string(p) != "new" {
		t.Errorf("before it follows: %q, %v", p, err)
	}
	b = follow(b, active)
	anchor := b.Anchor()
	b = reopen(t, b, newKEK(t, 60), &anchor)
	if names(b.Slots()) != "sealed|s" || b.CurrentID() != freshID {
		t.Errorf("slots %q", names(b.Slots()))
	}
	for id, c := range map[seal.KeyID][]byte{id: c, freshID: fresh} {
		if _, err := b.Decrypt(id, c); err != nil {
			t.Error(err)
		}
	}
	// Another rotation is aborted: the staged KEK that b had open stays readable.
	staged = acknowledge(t, ok(active.Stage(newKEK(t, 100), imports(), now)), 100)
	b = acknowledge(t, follow(b, staged), 100)
	b = follow(b, ok(staged.Abort(now)))
	if !b.Holds(staged.StagedID()) || b.StagedID() != "" || len(b.own.Slots) != 1 {
		t.Errorf("%+v", b.Info())
	}
	// b's KEKs stay open after the keyrings that b left are closed.
	for _, k := range []*Keyring{a, staged, active} {
		k.Close()
	}
	if _, err := b.Abort(now); !errors.Is(err, errNothingStaged) {
		t.Error(err)
	}
	if _, err := b.AtLeast(99); err != nil {
		t.Error(err)
	}
}

// TestFollowsRefuses violates one condition after the other.
func TestFollowsRefuses(t *testing.T) {
	ok := must[*Keyring](t)
	a, b := cluster2(t)
	raised := ok(a.AtLeast(50))
	staged := acknowledge(t, ok(a.Stage(newKEK(t, 60), imports(), now)), 60)
	bStaged := ok(b.Follow(published(t, staged), nil))
	bOpened := ok(bStaged.OpenStaged(newKEK(t, 60)))
	bAcknowledged := acknowledge(t, bStaged, 60)
	restarted := reopen(t, bAcknowledged, newKEK(t, 1), nil)
	active := ok(staged.Activate(now))

	// Another cluster, and a KEK with the same bytes.
	first := ok(New(seal.ClusterID{9}, newKEK(t, 1), append(tpmSlots("cp-1", "one"), sharedSlots("one")...), nodes, now))
	foreign := ok(ok(first.Upgrade(entry("cp-1", "a"))).WithNode(entry("cp-2", "b"), now))

	// The own KEK of an intruder who knows the current one.
	forged := func(of *Keyring, first byte) *Keyring {
		f := acknowledge(t, ok(ok(of.AtLeast(1000)).Stage(newKEK(t, first), imports(), now)), first)
		return ok(f.Activate(now))
	}
	// A MAC under a KEK other than the named one.
	damaged := published(t, raised)
	damaged.mac = bytes.Clone(damaged.mac)
	damaged.mac[0] ^= 1
	// A rotation that forgets the KEK that it replaces.
	forgets := ok(active.Prune(a.CurrentID()))
	// Back to a commit on one node, by somebody who knows the KEK.
	doc := *raised.doc
	doc.Commit, doc.Seat = CommitLocal, "cp-1"
	back := ok(build(doc, raised.own, raised.kek, nil))
	// A retired KEK that does not match its key ID.
	doc = *active.doc
	doc.Retired = []retired{doc.Retired[0]}
	doc.Retired[0].Sealed = bytes.Repeat([]byte{1}, 60)
	hollow := must[*Untrusted](t)(Parse(forge(t, must[[]byte](t)(encodeBody(&doc)), newKEK(t, 60))))

	for name, c := range map[string]struct {
		local  *Keyring
		remote *Untrusted
		is     error
		cause  seal.Cause
		says   string
	}{
		"the same":                     {b, published(t, a), ErrInStep, "", ""},
		"a lower revision":             {raised, published(t, a), ErrOlder, "", ""},
		"the staged KEK is closed":     {restarted, published(t, active), ErrStagedClosed, "", ""},
		"another cluster":              {b, published(t, foreign), nil, seal.CauseAnchor, "of cluster 09"},
		"format 1":                     {b, must[*Untrusted](t)(Parse(newKeyring(t, 1).Marshal())), nil, seal.CauseAnchor, "format 2 and 1"},
		"a format 1 of its own":        {newKeyring(t, 1), published(t, raised), nil, seal.CauseAnchor, "format 1 and 2"},
		"a KEK never staged":           {b, published(t, active), nil, seal.CauseAnchor, "never acknowledged; if this node was removed while it was down"},
		"an older, of another KEK":     {ok(b.AtLeast(2000)), published(t, forged(a, 200)), nil, seal.CauseAnchor, "never acknowledged; if etcd was restored from a snapshot that is older than the prune"},
		"a KEK not acknowledged":       {bOpened, published(t, active), nil, seal.CauseAnchor, "not acknowledged that KEK yet"},
		"an intruder's KEK":            {b, published(t, forged(a, 200)), nil, seal.CauseAnchor, "never acknowledged"},
		"an intruder's, while staged":  {bAcknowledged, published(t, forged(a, 200)), nil, seal.CauseAnchor, "never acknowledged"},
		"another MAC":                  {b, damaged, nil, seal.CauseKeyringCorrupt, "MAC"},
		"a retired KEK does not open":  {bAcknowledged, hollow, nil, seal.CauseKeyringCorrupt, "retired"},
		"the former KEK is gone":       {bAcknowledged, published(t, forgets), nil, seal.CauseAnchor, "does not hold the anchored"},
		"the same revision":            {b, published(t, otherwise(t, a)), nil, seal.CauseForked, "revision 4 differ"},
		"the node was removed":         {b, published(t, ok(a.WithoutNode("cp-2"))), nil, seal.CauseNodeRemoved, "cp-2"},
		"the node has another EK":      {b, published(t, ok(a.WithNode(withEK(entry("cp-2", "b"), "c"), now))), nil, seal.CauseNodeRemoved, "with its TPM"},
		"the node has another SRK":     {b, published(t, ok(a.WithNode(withSRK(entry("cp-2", "b"), "c"), now))), nil, seal.CauseNodeRemoved, "with its TPM"},
		"it names no node of its own":  {ok(open(a.Shared(), newKEK(t, 1), nil)), published(t, raised), nil, seal.CauseNodeRemoved, "which node"},
		"back to a commit on one node": {b, published(t, back), nil, seal.CauseAnchor, "goes back"},
	} {
		t.Run(name, func(t *testing.T) {
			err := Follows(c.local, c.remote)
			if c.is == nil {
				wantRefusal(t, err, c.cause, c.says)
			} else if err != c.is {
				t.Errorf("%v, want %v", err, c.is)
			}
		})
	}
	for name, c := range map[string]struct {
		local  *Keyring
		remote *Keyring
	}{
		"a higher revision":      {b, raised},
		"an acknowledged KEK":    {bAcknowledged, active},
		"a KEK that was aborted": {bAcknowledged, ok(staged.Abort(now))},
		"a node that was added":  {b, ok(a.WithNode(Node{Name: "cp-3"}, now))},
		"a node that came back":  {a, ok(ok(b.WithoutNode("cp-1")).WithNode(entry("cp-1", "a"), now))},
	} {
		if err := Follows(c.local, published(t, c.remote)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func withEK(n Node, digit string) Node { n.EK = "sha256:" + hex64(digit); return n }

func withSRK(n Node, digit string) Node { n.SRK = bytes.Repeat([]byte(digit), 90); return n }

// withRevision returns k under another revision.
func withRevision(t testing.TB, k *Keyring, revision uint64) *Keyring {
	t.Helper()
	doc := *k.doc
	doc.Revision = revision - 1
	return must[*Keyring](t)(build(doc, k.own, k.kek, k.staged))
}

// otherwise returns another keyring of k's revision.
func otherwise(t testing.TB, k *Keyring) *Keyring {
	t.Helper()
	return withRevision(t, must[*Keyring](t)(k.WithNode(Node{Name: "cp-9"}, now)), k.Revision())
}

// TestRemovedNodesKeyring: a removed node kept the KEK, and writes a keyring with a KEK
// of its own before the anchors of the others have moved. Checked by the anchor alone,
// that keyring would be accepted and announced, and would bar the real one.
func TestRemovedNodesKeyring(t *testing.T) {
	ok := must[*Keyring](t)
	a, b := cluster2(t)
	anchor := b.Anchor()
	x := ok(open(a.Shared(), newKEK(t, 1), nil)) // the keyring that the removed node knows
	x = ok(x.OnNode("cp-1", nil, nil))
	x = ok(ok(x.AtLeast(1000)).Stage(newKEK(t, 200), sharedSlots("x"), now))
	forged := published(t, ok(x.Activate(now)))
	if _, err := forged.Open(newKEK(t, 200), &anchor); err != nil {
		t.Fatalf("the anchor alone refuses it, so that the test shows nothing: %v", err)
	}
	wantRefusal(t, Follows(b, forged), seal.CauseAnchor, "never acknowledged", string(b.CurrentID()))
	wantRefusal(t, Precedes(forged, b), seal.CauseAnchor, "not authenticated by a KEK that this node holds")
	// The real rotation goes on.
	staged := acknowledge(t, ok(a.Stage(newKEK(t, 60), imports(), now)), 60)
	b = acknowledge(t, ok(b.Follow(published(t, staged), nil)), 60)
	b = ok(b.Follow(published(t, ok(staged.Activate(now))), nil))
	// Afterwards no node follows a keyring that the removed node makes from its
	// knowledge.
	for what, forged := range map[string]*Keyring{
		"its KEK current":       ok(x.Activate(now)),
		"its KEK staged":        x,
		"the former KEK, alone": ok(ok(open(a.Shared(), newKEK(t, 1), nil)).AtLeast(5000)),
	} {
		if err := Follows(b, published(t, forged)); seal.CauseOf(err) != seal.CauseAnchor {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestPrecedes(t *testing.T) {
	ok := must[*Keyring](t)
	a, b := cluster2(t)
	snapshot := published(t, a)
	staged := acknowledge(t, ok(a.Stage(newKEK(t, 60), imports(), now)), 60)
	active := ok(staged.Activate(now))
	for name, local := range map[string]*Keyring{"staged since": staged, "activated since": active, "two rotations since": rotate2(t, active, 100)} {
		if err := Precedes(snapshot, local); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := Follows(local, snapshot); name == "staged since" && err != ErrOlder || err == nil {
			t.Errorf("%s: it is followed: %v", name, err)
		}
	}
	if err := Precedes(snapshot, b); err != ErrInStep {
		t.Error(err)
	}
	wantRefusal(t, Precedes(published(t, active), b), seal.CauseAnchor, "not authenticated by a KEK")
	wantRefusal(t, Precedes(published(t, ok(a.AtLeast(50))), b), seal.CauseAnchor, "higher revision")
	wantRefusal(t, Precedes(published(t, otherwise(t, a)), b), seal.CauseForked, "differ")
	wantRefusal(t, Precedes(published(t, withRevision(t, active, 1)), staged), seal.CauseForked, "has staged in revision") // a staged KEK does not justify overwriting the store
	damaged := published(t, a)
	damaged.mac = make([]byte, 32)
	wantRefusal(t, Precedes(damaged, active), seal.CauseAnchor, "not authenticated by a KEK")
	damaged = published(t, withRevision(t, active, 1))
	damaged.mac = make([]byte, 32)
	wantRefusal(t, Precedes(damaged, staged), seal.CauseAnchor, "not authenticated by a KEK") // anybody may write the name of a staged KEK
	pruned := ok(active.Prune(a.CurrentID()))
	wantRefusal(t, Precedes(snapshot, pruned), seal.CauseAnchor, "not authenticated by a KEK")
}

// rotate2 rotates a keyring of format 2 on one node.
func rotate2(t testing.TB, k *Keyring, first byte) *Keyring {
	t.Helper()
	ok := must[*Keyring](t)
	return ok(acknowledge(t, ok(k.Stage(newKEK(t, first), imports(), now)), first).Activate(now))
}
