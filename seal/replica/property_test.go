package replica_test

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// stored is a DEK seed that some node encrypted, as etcd holds it.
type stored struct {
	id         seal.KeyID
	ciphertext []byte
}

// TestProperties makes three real Unlockers do anything that they may do, in any order,
// over a store that loses answers, delays swaps, returns stale data, is restored, and
// in half of the runs is written by an intruder, who knows the KEKs that a node held at
// some time. At every moment each open node decrypts everything that was encrypted (I1),
// no node announces a KEK that it has left (I2), the announced KEK is in its file and
// anchor (I4), and a KEK is current only after each node has sealed it (I5). In the end,
// with every node up, the nodes are in step or show a fork (I3, I8). I1 and I2 are not
// demanded of a node whose KEK the intruder knows. Of a node whose KEK the intruder does
// not know, nothing else is demanded because of the intruder, but that it takes nothing of
// the intruder's.
func TestProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := newCluster(t)
		defer c.close()
		c.settle(t)
		w := &world{cluster: c, first: c.nodes[0].keyring().CurrentID(), left: map[string]map[seal.KeyID]bool{}, now: map[string]seal.KeyID{}, shared: map[string]string{}}
		actions := map[string]func(*rapid.T){
			"sync":         func(t *rapid.T) { _ = w.any(t).Sync(ctx) },
			"restart":      func(t *rapid.T) { w.any(t).start() },
			"encrypt":      w.encrypt,
			"advance":      w.advance,
			"abort":        func(t *rapid.T) { _ = w.any(t).driver().Abort(ctx) },
			"change":       func(t *rapid.T) { _ = w.any(t).change() },
			"take over":    func(t *rapid.T) { _ = w.any(t).takeOver() },
			"wrap anew":    func(t *rapid.T) { _ = w.any(t).wrapAnew(w.any(t).name) },
			"rotate":       w.rotateAll,
			"die":          w.die,
			"lose":         func(*rapid.T) { c.store.LoseAnswer() },
			"delay":        func(*rapid.T) { c.store.Delay() },
			"arrive":       func(*rapid.T) { c.store.Arrive() },
			"stale":        func(*rapid.T) { c.store.Stale() },
			"snapshot":     func(*rapid.T) { w.restores = append(w.restores, c.store.Snapshot()) },
			"restore":      w.restore,
			"fail to seal": w.failToSeal,
			"down": func(t *rapid.T) {
				c.store.SetDown(rapid.SampledFrom([]error{nil, nil, errDown}).Draw(t, "down"))
			},
			"": w.check,
		}
		if rapid.Bool().Draw(t, "an intruder") {
			w.intruder = &intruder{known: map[seal.KeyID]bool{}, forged: map[string]bool{}}
			defer w.intruder.close()
			actions["learn"], actions["write"], actions["write a record"], actions["campaign"] = w.learn, w.write, w.writeRecord, w.campaign
		}
		t.Repeat(actions)
		w.end(t)
	})
}

type world struct {
	*cluster
	objects  []stored
	restores []func()
	left     map[string]map[seal.KeyID]bool // by node: key IDs that it announced and left
	now      map[string]seal.KeyID
	shared   map[string]string // by node: the body of the keyring at the last check
	first    seal.KeyID        // the KEK of the beginning
	intruder *intruder         // nil: none
}

func (w *world) any(t *rapid.T) *node {
	return w.nodes[rapid.IntRange(0, len(w.nodes)-1).Draw(t, "node")]
}

func (w *world) encrypt(t *rapid.T) {
	ciphertext, id, err := w.any(t).Encrypt(fmt.Appendf(nil, "seed %d", len(w.objects)))
	must(t, err)
	w.objects = append(w.objects, stored{id, ciphertext})
}

// advance takes a step of a rotation of the current KEK.
func (w *world) advance(t *rapid.T) {
	n := w.any(t)
	_, _ = n.driver().Advance(ctx, n.keyring().CurrentID())
}

// rotateAll makes as many steps of a rotation as possible, with every node up.
func (w *world) rotateAll(t *rapid.T) {
	n := w.any(t)
	former := n.keyring().CurrentID()
	for range 4 {
		_, _ = n.driver().Advance(ctx, former)
		for _, n := range w.nodes {
			_ = n.Sync(ctx)
		}
	}
}

// die ends a node's process before it saves its file, or its anchor, whatever it does,
// and starts the process again.
func (w *world) die(t *rapid.T) {
	n := w.any(t)
	d := rapid.SampledFrom([]*disk{&n.file, &n.anchor}).Draw(t, "before it saves")
	d.dies = true
	rapid.SampledFrom([]func(){
		func() { _ = n.Sync(ctx) },
		func() { _, _ = n.driver().Advance(ctx, n.keyring().CurrentID()) },
		func() { _ = n.driver().Abort(ctx) },
		func() { _ = n.takeOver() },
	}).Draw(t, "during")()
	n.start()
}

// failToSeal makes a node fail to seal a staged KEK, or succeed again.
func (w *world) failToSeal(t *rapid.T) {
	w.any(t).fails = rapid.SampledFrom([]error{nil, errDown}).Draw(t, "seals")
}

func (w *world) restore(t *rapid.T) {
	if len(w.restores) > 0 {
		w.restores[rapid.IntRange(0, len(w.restores)-1).Draw(t, "snapshot")]()
	}
}

func (w *world) check(t *rapid.T) {
	for _, n := range w.nodes {
		w.unlock(t, n)
		k := n.keyring()
		w.checkIntruder(t, n)
		if w.intruder.knows(k.CurrentID()) {
			w.now[n.name] = k.CurrentID()
			continue
		}
		for i, o := range w.objects {
			if b, err := n.Decrypt(o.id, o.ciphertext); err != nil || string(b) != fmt.Sprintf("seed %d", i) {
				t.Fatalf("I1: node %s (revision %d, key ID %s) does not decrypt what is under %s: %v", n.name, k.Revision(), k.CurrentID(), o.id, err)
			}
		}
		if last := w.now[n.name]; last != "" && last != k.CurrentID() {
			if w.left[n.name] == nil {
				w.left[n.name] = map[seal.KeyID]bool{}
			}
			w.left[n.name][last] = true
		}
		if w.now[n.name] = k.CurrentID(); w.left[n.name][k.CurrentID()] {
			t.Fatalf("I2: node %s announces %s again", n.name, k.CurrentID())
		}
		anchor, err := keyring.ParseAnchor(n.anchor.b)
		must(t, err)
		file, err := keyring.Parse(n.file.b)
		must(t, err)
		if anchor.KeyID != k.CurrentID() || file.CurrentID() != k.CurrentID() {
			t.Fatalf("I4: node %s announces %s, its file has %s and its anchor %s", n.name, k.CurrentID(), file.CurrentID(), anchor.KeyID)
		}
	}
}

// end starts every node, and demands that the nodes are in step or show a fork.
func (w *world) end(t *rapid.T) {
	w.store.SetDown(nil)
	for _, n := range w.nodes {
		n.fails = nil
	}
	w.store.Arrive()
	_ = w.store.Swap(ctx, []byte("x"), nil) // ends a fault that waits for a swap
	_, _ = w.store.Load(ctx)                // or for a load
	forked := false
	for range 6 {
		for _, n := range w.nodes {
			forked = seal.CauseOf(n.Sync(ctx)) == seal.CauseForked || forked
		}
	}
	if w.intruder != nil {
		w.endIntruder(t)
		return
	}
	if forked {
		return
	}
	shared := string(w.nodes[0].keyring().Shared())
	for _, n := range w.nodes {
		if s := n.Replica.State(); !s.InStep || string(n.keyring().Shared()) != shared {
			t.Fatalf("I8: node %s is not in step, and no node shows a fork: %v", n.name, s.Problem)
		}
	}
	if len(w.nodes[0].keyring().Info().Retired) < keyring.MaxRetired-1 {
		w.rotate(t, 0)
	}
	w.check(t)
}
