package replica_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"

	"pgregory.net/rapid"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// intruder writes the store. It can know the KEKs that a node held at some time, as a
// removed node does, and it has a KEK of its own.
type intruder struct {
	had    *keyring.Keyring // the keyring of that time, opened; nil: none yet
	known  map[seal.KeyID]bool
	forged map[string]bool // the bodies of the keyrings that it wrote; a node makes the MAC again
	kek    *seal.Secret    // the last KEK that it made, in order to activate the KEK that it staged
}

func (x *intruder) close() {
	if x.had != nil {
		x.had.Close()
	}
	if x.kek != nil {
		x.kek.Close()
	}
}

// knows reports whether the intruder holds a KEK. It can then make keyrings that a node
// with this current KEK follows.
func (x *intruder) knows(id seal.KeyID) bool { return x != nil && x.known[id] }

// learn gives the intruder the KEKs that a node holds now.
func (w *world) learn(t *rapid.T) {
	k := w.any(t).keyring()
	u, err := keyring.Parse(k.Shared())
	must(t, err)
	had, err := u.Open(copied(t, k.KEK()), nil)
	must(t, err)
	if k.StagedID() != "" {
		staged := keyring.StagedKEK(k)
		if staged == nil {
			had.Close()
			return
		}
		opened, err := had.OpenStaged(copied(t, staged))
		must(t, err)
		had.Close()
		had = opened
	}
	if w.intruder.had != nil {
		w.intruder.had.Close()
	}
	w.intruder.had = had
	w.intruder.known[had.CurrentID()], w.intruder.known[had.StagedID()] = true, true
	for _, r := range had.Info().Retired {
		w.intruder.known[r.KeyID] = true
	}
}

func copied(t tb, kek *seal.Secret) (out *seal.Secret) {
	kek.With(func(b []byte) {
		var err error
		out, err = seal.Memory{}.Take(bytes.Clone(b))
		must(t, err)
	})
	return out
}

const anotherByte = "another byte"

// write has the intruder write the Keyring: with the KEKs that it knows, or without any.
func (w *world) write(t *rapid.T) {
	forge := map[string]func(*rapid.T) []byte{
		"a higher revision": w.raise, "what it had": w.replay, "a staged KEK of its own": w.stageOwn, "a current KEK of its own": w.activateOwn,
		"a node less": w.dropNode, "another revision": w.claim, anotherByte: w.damage, "another cluster's": others, "no keyring": garbage, "nothing": nothing,
	}
	what := rapid.SampledFrom(slices.Sorted(maps.Keys(forge))).Draw(t, "the intruder writes")
	b := forge[what](t)
	if what == anotherByte { // which can make the body that an honest node makes next
		w.store.Write(b)
		return
	}
	w.put(b)
}

// put has the intruder write bytes in the place of the Keyring.
func (w *world) put(b []byte) {
	if there, err := w.store.Load(ctx); err != nil || body(there) != body(b) {
		w.intruder.forged[body(b)] = true
	}
	w.store.Write(b)
}

// body returns the body of a keyring, or all bytes if they are no keyring.
func body(b []byte) string {
	var k struct{ Body []byte }
	if json.Unmarshal(b, &k) != nil || k.Body == nil {
		return string(b)
	}
	return string(k.Body)
}

// above is a revision above the store's.
func (w *world) above(t *rapid.T) uint64 {
	rev := uint64(0)
	for _, n := range w.nodes {
		rev = max(rev, n.keyring().Revision())
	}
	return rev + rapid.Uint64Range(0, 2).Draw(t, "revisions above")
}

// revise returns the intruder's keyring after changes, in a revision above the others.
func (w *world) revise(t *rapid.T, changes ...func(*keyring.Keyring) (*keyring.Keyring, error)) []byte {
	if w.intruder.had == nil {
		return garbage(t)
	}
	k := w.intruder.had
	rev := w.above(t)
	for _, change := range append(changes, func(k *keyring.Keyring) (*keyring.Keyring, error) { return k.AtLeast(rev) }) {
		next, err := change(k)
		must(t, err)
		if k != w.intruder.had {
			k.Close()
		}
		k = next
	}
	defer k.Close()
	return k.Shared()
}

func (w *world) raise(t *rapid.T) []byte { return w.revise(t) }

func (w *world) replay(t *rapid.T) []byte {
	if w.intruder.had == nil {
		return garbage(t)
	}
	return w.intruder.had.Shared()
}

func (w *world) dropNode(t *rapid.T) []byte {
	name := w.any(t).name
	return w.revise(t, func(k *keyring.Keyring) (*keyring.Keyring, error) {
		if len(k.Nodes()) == 1 || !slices.ContainsFunc(k.Nodes(), func(e keyring.Node) bool { return e.Name == name }) {
			return k.AtLeast(0)
		}
		return k.WithoutNode(name)
	})
}

// campaign has the intruder learn a node's KEKs, stage a KEK of its own, and activate it,
// whichever nodes have followed and acknowledged meanwhile.
func (w *world) campaign(t *rapid.T) {
	w.learn(t)
	for _, forge := range []func(*rapid.T) []byte{w.stageOwn, w.activateOwn} {
		w.put(forge(t))
		for range rapid.IntRange(0, 3).Draw(t, "nodes that read it") {
			w.failToSeal(t)
			_ = w.any(t).Sync(ctx)
			w.check(t)
		}
	}
}

// ownKEK is the KEK that the intruder made last, or a fresh one, which the keyring never had.
func (w *world) ownKEK(t *rapid.T, k *keyring.Keyring) *seal.Secret {
	x := w.intruder
	if x.kek == nil || k.Holds(keyring.NewKeyID(k.ClusterID(), x.kek)) || rapid.IntRange(0, 3).Draw(t, "the KEK is a fresh one") == 0 {
		if x.kek != nil {
			x.kek.Close()
		}
		var err error
		x.kek, err = seal.Memory{}.NewKEK()
		must(t, err)
		x.known[keyring.NewKeyID(k.ClusterID(), x.kek)] = true
	}
	return copied(t, x.kek)
}

// own are the changes after which the intruder's KEK is staged.
func (w *world) own(t *rapid.T) (changes []func(*keyring.Keyring) (*keyring.Keyring, error)) {
	if w.intruder.had != nil && w.intruder.had.StagedID() != "" {
		changes = append(changes, func(k *keyring.Keyring) (*keyring.Keyring, error) { return k.Abort(now) })
	}
	return append(changes, func(k *keyring.Keyring) (*keyring.Keyring, error) {
		kek := w.ownKEK(t, k)
		var slots []seal.Slot
		for _, n := range k.Nodes() {
			slots = append(slots, slotFor(n.Name, kek))
		}
		return k.Stage(kek, slots, now)
	})
}

func (w *world) stageOwn(t *rapid.T) []byte { return w.revise(t, w.own(t)...) }

func (w *world) activateOwn(t *rapid.T) []byte {
	return w.revise(t, append(w.own(t), func(k *keyring.Keyring) (*keyring.Keyring, error) {
		kek, name := keyring.StagedKEK(k), k.Nodes()[0].Name
		return k.OnNode(name, []seal.Slot{slotFor(name, k.KEK())}, []seal.Slot{slotFor(name, kek)})
	}, func(k *keyring.Keyring) (*keyring.Keyring, error) { return k.Activate(now) })...)
}

// claim is the store's keyring with a revision that no honest node reaches. Its MAC does not
// verify.
func (w *world) claim(t *rapid.T) []byte {
	b, err := w.store.Load(ctx)
	var k struct {
		Body []byte          `json:"body"`
		MAC  json.RawMessage `json:"mac"`
	}
	if err != nil || json.Unmarshal(b, &k) != nil {
		return garbage(t)
	}
	k.Body = regexp.MustCompile(`"revision":\d+`).ReplaceAll(k.Body, fmt.Appendf(nil, `"revision":%d`, w.above(t)+1000))
	b, err = json.Marshal(k)
	must(t, err)
	return append(b, '\n')
}

// damage is the store's keyring with another byte in it.
func (w *world) damage(t *rapid.T) []byte {
	b, err := w.store.Load(ctx)
	if err != nil {
		return garbage(t)
	}
	at := rapid.IntRange(0, len(b)-1).Draw(t, "byte")
	b[at]++
	return b
}

// others is a keyring of another cluster.
func others(t *rapid.T) []byte {
	kek, err := seal.Memory{}.NewKEK()
	must(t, err)
	k, err := keyring.New(seal.ClusterID{2}, kek, []seal.Slot{slotFor("a", kek)}, []keyring.Node{{Name: "a"}}, now)
	must(t, err)
	defer k.Close()
	next, err := k.Upgrade(keyring.Node{Name: "a"})
	must(t, err)
	defer next.Close()
	return next.Shared()
}

func garbage(*rapid.T) []byte { return []byte("{}") }

// nothing deletes the Keyring.
func nothing(*rapid.T) []byte { return nil }

// writeRecord has the intruder write, copy or delete a record.
func (w *world) writeRecord(t *rapid.T) {
	of, as := w.any(t).name, w.any(t).name
	switch rapid.SampledFrom([]string{"delete", "copy", "oversize", "lie"}).Draw(t, "record") {
	case "delete":
		w.store.DeleteRecord(of)
	case "copy":
		if all, err := w.store.Records(ctx, of); err == nil && len(all) == 1 {
			_ = w.store.PutRecord(ctx, as, all[0].Bytes)
		}
	case "oversize":
		_ = w.store.PutRecord(ctx, of, bytes.Repeat([]byte("x"), 2*keyring.MaxRecordSize))
	case "lie":
		if k := w.intruder.had; k != nil {
			current := w.nodes[0].keyring()
			b, err := k.SignRecord(keyring.Record{Node: of, Formats: keyring.Formats(), Version: "test", Revision: current.Revision(),
				Anchored: current.CurrentID(), Announced: current.CurrentID(), Encrypted: current.CurrentID(), Acknowledged: k.StagedID(), Started: now})
			must(t, err)
			_ = w.store.PutRecord(ctx, of, b)
		}
	}
}

// checkIntruder demands that a node whose KEK the intruder did not know takes nothing that
// the intruder made; and that a KEK becomes current on a node only after that node has
// sealed it, and, if the intruder does not know that KEK, all other nodes of that keyring
// have, too (I5).
func (w *world) checkIntruder(t *rapid.T, n *node) {
	k := n.keyring()
	before := w.now[n.name]
	if shared := body(k.Shared()); w.intruder != nil && w.intruder.forged[shared] && shared != w.shared[n.name] && before != "" && !w.intruder.knows(before) {
		t.Fatalf("node %s (key ID %s), whose KEK the intruder does not know, takes the intruder's keyring (revision %d, key ID %s)", n.name, before, k.Revision(), k.CurrentID())
	}
	w.shared[n.name] = body(k.Shared())
	id := k.CurrentID()
	for _, other := range w.nodes {
		listed := slices.ContainsFunc(k.Nodes(), func(e keyring.Node) bool { return e.Name == other.name })
		if id != w.first && !other.sealed[id] && (other == n || listed && !w.intruder.knows(id)) {
			t.Fatalf("I5: %s is current on node %s, and node %s has never sealed it", id, n.name, other.name)
		}
	}
}

// endIntruder lets an operator end what an intruder did: a node whose KEK the intruder
// does not know replaces what is in the store. That node is then in step, and each other
// node is, too, or says why it is not.
func (w *world) endIntruder(t *rapid.T) {
	var keeper *node
	for _, n := range w.nodes {
		w.unlock(t, n)
		if k := n.keyring(); !w.intruder.knows(k.CurrentID()) && (keeper == nil || k.Revision() > keeper.keyring().Revision()) {
			keeper = n
		}
	}
	if keeper != nil && keeper.Sync(ctx) != nil {
		must(t, keeper.Publish(ctx, seal.Memory{}, true))
	}
	for range 6 {
		for _, n := range w.nodes {
			_ = n.Sync(ctx)
		}
	}
	for _, n := range w.nodes {
		if s := n.Replica.State(); s.InStep == (s.Problem != nil) || n == keeper && !s.InStep {
			t.Fatalf("node %s is in step: %v, and it shows: %v", n.name, s.InStep, s.Problem)
		}
	}
	w.check(t)
}

// unlock starts a node again that has locked itself, because the intruder, who knows the
// node's KEK, wrote that the node was removed. No other node locks itself.
func (w *world) unlock(t *rapid.T, n *node) {
	if _, err := n.Unlocker.Keyring(); err == nil {
		return
	} else if seal.CauseOf(err) != seal.CauseNodeRemoved || !w.intruder.knows(w.now[n.name]) {
		t.Fatalf("node %s has locked itself: %v", n.name, err)
	}
	n.start()
}
