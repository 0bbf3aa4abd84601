package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/replica/storetest"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
)

// rotations is how often a whole rotation is timed. The largest cluster takes seconds.
const rotations = 3

// printRotations compares whole rotations by the number of nodes: stage; every node opens
// the KEK, seals it and acknowledges; activate; every node follows and records it. The
// nodes are simulated: each runs kleidi's own replica and unlocker in this process, over
// a store in memory, and all of them share this machine's TPM, which does one thing after
// the other. Nodes with TPMs of their own work at the same time.
func printRotations(ctx context.Context, w *tpm.Wrapper, gate *attest.Gate) error {
	var one time.Duration
	fmt.Printf("a whole rotation on one swtpm for all nodes, median of %d, the ratio to one node, and the keyring in the store while a KEK is staged:", rotations)
	for _, nodes := range []int{1, 3, 50} {
		took, staged, err := timeRotations(ctx, w, gate, nodes)
		if err != nil {
			return fmt.Errorf("a rotation of %d nodes: %w", nodes, err)
		}
		if nodes == 1 {
			one = took
		}
		fmt.Printf(" %d: %.0f ms (× %.1f), %.1f KB;", nodes, inMS(took), took.Seconds()/one.Seconds(), float64(staged)/1e3)
	}
	fmt.Print("\n\n")
	return nil
}

func timeRotations(ctx context.Context, w *tpm.Wrapper, gate *attest.Gate, nodes int) (took time.Duration, staged int, err error) {
	c, err := newSimulated(ctx, w, gate, nodes)
	if err != nil {
		return 0, 0, err
	}
	defer c.close()
	if err := c.settle(ctx); err != nil {
		return 0, 0, err
	}
	var all []time.Duration
	for range rotations {
		begin := time.Now()
		size, err := c.rotate(ctx)
		if err != nil {
			return 0, 0, err
		}
		all, staged = append(all, time.Since(begin)), max(staged, size)
	}
	slices.Sort(all)
	return all[len(all)/2], staged, nil
}

// simulated is a cluster in this process.
type simulated struct {
	store *storetest.Memory
	peers []tpm.Peer // by node
	nodes []*simulatedNode
	stop  context.CancelFunc
	run   sync.WaitGroup
}

type simulatedNode struct {
	*unlock.Unlocker
	*replica.Replica
}

// newSimulated starts a cluster whose first node has the seat.
func newSimulated(ctx context.Context, w *tpm.Wrapper, gate *attest.Gate, nodes int) (*simulated, error) {
	self, err := w.Self(ctx)
	if err != nil {
		return nil, err
	}
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		return nil, err
	}
	c := &simulated{store: new(storetest.Memory)}
	entries, wrappers := make([]keyring.Node, nodes), make([]*tpm.Wrapper, nodes)
	for i := range nodes {
		name := fmt.Sprint("simulated-", i)
		digest := sha256.Sum256([]byte(name))
		ek := fmt.Sprintf("sha256:%x", digest)
		// Each entry names a key of its own, but slots are wrapped for this machine's
		// key.
		srk := slices.Concat(self.SRK[:len(self.SRK)-len(digest)], digest[:])
		entries[i] = keyring.Node{Name: name, EK: ek, SRK: srk, EpochIndex: self.Epoch.Index(), Added: time.Now()}
		c.peers = append(c.peers, tpm.Peer{Node: name, EK: ek, SRK: self.SRK, Epoch: self.Epoch})
		config := w.Config
		config.Node = name
		wrappers[i] = tpm.NewWrapper(config)
	}
	slot, err := wrappers[0].Wrap(ctx, kek)
	if err != nil {
		return nil, err
	}
	first := keyring.Node{Name: entries[0].Name, EK: entries[0].EK}
	ring, err := keyring.New(seal.ClusterID{1}, kek, []seal.Slot{slot}, []keyring.Node{first}, time.Now())
	if err == nil {
		ring, err = replaced(ring)(ring.Upgrade(entries[0]))
	}
	for i := 1; i < nodes && err == nil; i++ {
		ring, err = replaced(ring)(ring.WithNode(entries[i], time.Now()))
	}
	if err != nil {
		return nil, err
	}
	defer ring.Close()
	ctx, c.stop = context.WithCancel(ctx)
	for i := range nodes {
		if err := c.start(ctx, ring, entries[i].Name, wrappers[i], gate); err != nil {
			c.close()
			return nil, err
		}
	}
	return c, nil
}

// start starts a node with its own slot of the current KEK.
func (c *simulated) start(ctx context.Context, ring *keyring.Keyring, name string, w *tpm.Wrapper, gate *attest.Gate) error {
	slot, err := w.Wrap(ctx, ring.KEK())
	if err != nil {
		return err
	}
	here, err := ring.OnNode(name, []seal.Slot{slot}, nil)
	if err != nil {
		return err
	}
	defer here.Close()
	n, log := &simulatedNode{}, slog.New(slog.DiscardHandler)
	judge := &attest.Gate{Attester: gate.Attester, Node: name, Counter: gate.Counter, Bank: gate.Bank}
	view := slotview.Reader{Node: name, Counter: w.Counter}
	n.Unlocker = unlock.New(unlock.Config{
		Store: &memoryFile{b: here.Marshal()}, Anchor: unlock.FileAnchor{Store: &memoryFile{b: here.Anchor().Marshal()}},
		Gate: judge, Wrappers: []seal.Wrapper{w}, Log: log,
		Commit: func(ctx context.Context, old, next *keyring.Keyring) error { return n.Replica.Commit(ctx, old, next) },
	})
	n.Replica = replica.New(replica.Config{
		Store: c.store, Unlocker: n.Unlocker, Log: log,
		Wrap: func(ctx context.Context, _ *keyring.Keyring, kek *seal.Secret) ([]seal.Slot, error) {
			s, err := w.Wrap(ctx, kek)
			return []seal.Slot{s}, err
		},
		BootStates: func(_ context.Context, k *keyring.Keyring) ([]keyring.RecordedState, error) {
			return view.RecordStates(k.OwnSlots(), k.ClusterID())
		},
	})
	if err := n.Unlock(ctx); err != nil {
		return err
	}
	c.nodes = append(c.nodes, n)
	c.run.Go(func() { n.Replica.Run(ctx) })
	return nil
}

func (c *simulated) close() {
	c.stop()
	c.run.Wait()
	for _, n := range c.nodes {
		n.Unlocker.Close()
	}
}

// settle returns once every node has reported that it is in step.
func (c *simulated) settle(ctx context.Context) error {
	return c.drive(ctx, "", func(rotation.Step) {})
}

// rotate replaces the current KEK. It returns the size of the keyring in the store while
// the fresh one was staged.
func (c *simulated) rotate(ctx context.Context) (staged int, err error) {
	k, err := c.nodes[0].Unlocker.Keyring()
	if err != nil {
		return 0, err
	}
	err = c.drive(ctx, k.CurrentID(), func(s rotation.Step) {
		if s.Do == rotation.Stage {
			b, _ := c.store.Load(ctx) // a store in memory always has it
			staged = len(b)
		}
	})
	return staged, err
}

// drive takes the steps of a rotation, as package rollout does, until it has settled.
func (c *simulated) drive(ctx context.Context, replace seal.KeyID, took func(rotation.Step)) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	d := &rotation.Driver{Cluster: c.nodes[0], Wrap: c.wrap}
	for {
		round := c.nodes[0].Round()
		step, err := d.Advance(ctx, replace)
		switch {
		case err == nil && step.Do == rotation.Settled:
			return nil
		case err == nil && step.Do != rotation.Wait:
			took(step)
			continue
		}
		select {
		case <-round:
		case <-ctx.Done():
			return errors.Join(err, fmt.Errorf("waiting for %s: %w", rotation.Describe(step.Missing), ctx.Err()))
		}
	}
}

// wrap wraps a fresh KEK for the boot states in all nodes' records.
func (c *simulated) wrap(_ context.Context, k *keyring.Keyring, kek *seal.Secret, records []*keyring.VerifiedRecord) (slots []seal.Slot, err error) {
	for _, r := range records {
		at := slices.IndexFunc(c.peers, func(p tpm.Peer) bool { return p.Node == r.Node })
		for _, recorded := range r.BootStates {
			state, err := slotview.BootStateOf(recorded, k.ClusterID())
			if err != nil {
				return nil, err
			}
			slot, err := tpm.WrapFor(c.peers[at], kek, state, recorded.AtMost)
			if err != nil {
				return nil, err
			}
			slots = append(slots, slot)
		}
	}
	return slots, nil
}

// Keyring implements rotation.Cluster.
func (n *simulatedNode) Keyring(context.Context) (*keyring.Keyring, error) {
	if s := n.Replica.State(); !s.InStep {
		return nil, errors.Join(errors.New("not in step"), s.Problem)
	}
	return n.Unlocker.Keyring()
}

// memoryFile is a file of a simulated node.
type memoryFile struct {
	b []byte
	n int
}

func (f *memoryFile) Load(context.Context) ([]byte, store.Version, error) {
	if f.b == nil {
		return nil, "", fs.ErrNotExist
	}
	return bytes.Clone(f.b), store.Version(strconv.Itoa(f.n)), nil
}

func (f *memoryFile) Save(_ context.Context, b []byte, _ store.Version) (store.Version, error) {
	f.b, f.n = bytes.Clone(b), f.n+1
	return store.Version(strconv.Itoa(f.n)), nil
}
