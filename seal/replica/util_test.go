package replica_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strconv"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/replica/storetest"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

var (
	ctx = context.Background()
	now = time.Unix(1_790_000_000, 0)
)

// tb is the common part of *testing.T and *rapid.T.
type tb interface {
	Helper()
	Fatalf(format string, args ...any)
	Errorf(format string, args ...any)
}

// disk is a file in memory.
type disk struct {
	b    []byte
	n    int
	dies bool // at the next save, before it
}

var errDied = errors.New("the process died")

func (d *disk) Load(context.Context) ([]byte, store.Version, error) {
	if d.b == nil {
		return nil, "", fs.ErrNotExist
	}
	return bytes.Clone(d.b), store.Version(strconv.Itoa(d.n)), nil
}

func (d *disk) Save(_ context.Context, b []byte, old store.Version) (store.Version, error) {
	if d.dies {
		d.dies = false
		return "", errDied
	}
	if _, v, _ := d.Load(ctx); v != old {
		return "", store.ErrConflict
	}
	d.b, d.n = bytes.Clone(b), d.n+1
	return store.Version(strconv.Itoa(d.n)), nil
}

func (d *disk) Remove(context.Context) error {
	d.b = nil
	return nil
}

// plain is the wrapper of one node. Its slots hold the KEK in plain, and no other node's
// wrapper opens them.
type plain struct {
	node string
	err  error
	// unwrapping is called before the node opens a slot; nil does nothing.
	unwrapping func()
}

func (w *plain) Type() string { return seal.TypeTPM }

func (w *plain) Wrap(_ context.Context, kek *seal.Secret) (seal.Slot, error) {
	return slotFor(w.node, kek), w.err
}

func slotFor(node string, kek *seal.Secret) (s seal.Slot) {
	kek.With(func(b []byte) {
		data, err := json.Marshal(map[string][]byte{"kek": b})
		if err != nil {
			panic(err)
		}
		s = seal.Slot{Type: seal.TypeTPM, Node: node, Data: data}
	})
	return s
}

func (w *plain) Unwrap(_ context.Context, s seal.Slot) (*seal.Secret, error) {
	if s.Node != w.node {
		return nil, seal.ErrNotMine
	}
	if w.unwrapping != nil {
		w.unwrapping()
	}
	if w.err != nil {
		return nil, w.err
	}
	var d map[string][]byte
	if err := json.Unmarshal(s.Data, &d); err != nil {
		return nil, err
	}
	return seal.Memory{}.Take(d["kek"])
}

// node is a node of a cluster: its disk, and the processes that run on it one after the
// other.
type node struct {
	t       tb
	name    string
	store   *storetest.Memory
	file    disk
	anchor  disk
	removal disk
	wrapper plain
	sealed  map[seal.KeyID]bool // the KEKs that it has sealed
	fails   error               // the reason why it can't seal a staged KEK; nil if it can
	// machine is what the node's TPM says of itself; the zero value is no machine of the keyring.
	machine keyring.Node
	// archives are what the node finds for a pruned KEK.
	archives map[string][]byte
	// states are the node's boot states; nil means none.
	states func(context.Context, *keyring.Keyring) ([]keyring.RecordedState, error)
	log    slog.Handler // nil discards
	*unlock.Unlocker
	*replica.Replica
}

// start starts the node's process, which opens the keyring.
func (n *node) start() {
	n.t.Helper()
	if n.Unlocker != nil {
		n.Unlocker.Close()
	}
	n.file.dies, n.anchor.dies = false, false
	log := slog.New(cmp.Or(n.log, slog.DiscardHandler))
	n.Unlocker = unlock.New(unlock.Config{
		Store: &n.file, Anchor: unlock.FileAnchor{Store: &n.anchor}, Wrappers: []seal.Wrapper{&n.wrapper}, Log: log,
		Commit: func(ctx context.Context, old, next *keyring.Keyring) error {
			return n.Replica.Commit(ctx, old, next)
		},
	})
	n.Replica = replica.New(replica.Config{
		Store: n.store, Unlocker: n.Unlocker, Version: "test", Log: log, Removal: &n.removal,
		Wrap: func(ctx context.Context, k *keyring.Keyring, kek *seal.Secret) ([]seal.Slot, error) {
			if n.fails != nil {
				return nil, n.fails
			}
			s, err := n.wrapper.Wrap(ctx, kek)
			n.sealed[keyring.NewKeyID(k.ClusterID(), kek)] = true
			return []seal.Slot{s}, err
		},
		Machine:  func(context.Context) (keyring.Node, error) { return n.machine, nil },
		Archives: func(context.Context, seal.KeyID) map[string][]byte { return n.archives },
		BootStates: func(ctx context.Context, k *keyring.Keyring) ([]keyring.RecordedState, error) {
			if n.states == nil {
				return nil, nil
			}
			return n.states(ctx, k)
		},
	})
	if err := n.Unlock(ctx); err != nil {
		n.t.Fatalf("node %s: %v", n.name, err)
	}
}

func (n *node) keyring() *keyring.Keyring {
	n.t.Helper()
	k, err := n.Unlocker.Keyring()
	if err != nil {
		n.t.Fatalf("node %s: %v", n.name, err)
	}
	return k
}

// driver drives a rotation from this node.
func (n *node) driver() *rotation.Driver {
	return &rotation.Driver{Cluster: inStep{n}, Wrap: func(_ context.Context, k *keyring.Keyring, kek *seal.Secret, records []*keyring.VerifiedRecord) (slots []seal.Slot, err error) {
		for _, r := range records {
			slots = append(slots, slotFor(r.Node, kek))
		}
		return slots, nil
	}}
}

// inStep is a node as seen by the driver.
type inStep struct{ *node }

func (n inStep) Keyring(ctx context.Context) (*keyring.Keyring, error) {
	if err := n.Sync(ctx); err != nil {
		return nil, err
	}
	return n.Unlocker.Keyring()
}

// takeOver makes this node drive the rotation; wrapAnew wraps the staged KEK for a node
// again.
func (n *node) takeOver() error {
	return n.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := keyring.TakeOver(k)
		if next == k {
			err = errDied // nothing to change
		}
		return []*keyring.Keyring{next}, err
	})
}

func (n *node) wrapAnew(name string) error {
	return n.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		kek := keyring.StagedKEK(k)
		if kek == nil {
			return nil, errDied
		}
		next, err := keyring.WithStagedSlots(k, []seal.Slot{slotFor(name, kek)})
		return []*keyring.Keyring{next}, err
	})
}

// change makes a revision of the shared keyring that changes nothing but its number.
func (n *node) change() error {
	return n.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := k.AtLeast(0)
		return []*keyring.Keyring{next}, err
	})
}

// cluster is three nodes and their store. The first node has the seat.
type cluster struct {
	store *storetest.Memory
	nodes []*node
}

func newCluster(t tb) *cluster {
	t.Helper()
	c := &cluster{store: new(storetest.Memory)}
	kek, err := seal.Memory{}.NewKEK()
	must(t, err)
	names := []string{"a", "b", "c"}
	entry := func(i int) keyring.Node {
		return keyring.Node{Name: names[i], EK: fmt.Sprintf("sha256:%064x", i+1), SRK: []byte{byte(i)}, EpochIndex: keyring.FirstEpochIndex}
	}
	first := entry(0)
	first.SRK, first.EpochIndex = nil, 0
	k, err := keyring.New(seal.ClusterID{1}, kek, []seal.Slot{slotFor("a", kek)}, []keyring.Node{first}, now)
	must(t, err)
	k, err = k.Upgrade(entry(0))
	must(t, err)
	for i := 1; i < len(names); i++ {
		k, err = k.WithNode(entry(i), now)
		must(t, err)
	}
	for _, name := range names {
		here, err := k.OnNode(name, []seal.Slot{slotFor(name, kek)}, nil)
		must(t, err)
		n := &node{t: t, name: name, store: c.store, file: disk{b: here.Marshal()}, anchor: disk{b: here.Anchor().Marshal()}, wrapper: plain{node: name}, sealed: map[seal.KeyID]bool{}}
		n.start()
		c.nodes = append(c.nodes, n)
	}
	return c
}

func (c *cluster) close() {
	for _, n := range c.nodes {
		n.Unlocker.Close()
	}
}

func must(t tb, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%v", err)
	}
}

// open returns a cluster whose nodes are in step.
func open(t *testing.T) *cluster {
	t.Helper()
	c := newCluster(t)
	t.Cleanup(c.close)
	c.settle(t)
	return c
}

// settle makes rounds on every node until nothing changes.
func (c *cluster) settle(t tb) {
	t.Helper()
	for range 3 {
		for _, n := range c.nodes {
			if err := n.Sync(ctx); err != nil {
				t.Fatalf("node %s: %v", n.name, err)
			}
		}
	}
}

// rotate drives a rotation from node by until it has settled.
func (c *cluster) rotate(t tb, by int) {
	t.Helper()
	n := c.nodes[by]
	former := n.keyring().CurrentID()
	for range 20 {
		step, err := n.driver().Advance(ctx, former)
		if err != nil {
			t.Fatalf("%v", err)
		}
		if step.Do == rotation.Settled {
			return
		}
		for _, n := range c.nodes {
			_ = n.Sync(ctx)
		}
	}
	t.Fatalf("the rotation does not settle")
}

var errDown = errors.New("the API is down")
