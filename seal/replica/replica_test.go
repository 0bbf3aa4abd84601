package replica_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/seal/store"
)

// TestHandOver: the node that has the seat hands the keyring over to the store, and the
// others follow. They don't create it.
func TestHandOver(t *testing.T) {
	c := newCluster(t)
	t.Cleanup(c.close)
	if err := c.nodes[1].Sync(ctx); err == nil || !strings.Contains(err.Error(), "node a hands the keyring over") {
		t.Errorf("a node without the seat: %v", err)
	}
	if err := c.nodes[1].change(); err == nil || !strings.Contains(err.Error(), "only node a") {
		t.Errorf("a change without the seat: %v", err)
	}
	c.settle(t)
	for _, n := range c.nodes {
		if i := n.keyring().Info(); i.Commit != keyring.CommitCluster || !n.Replica.State().InStep {
			t.Errorf("node %s: %+v, %+v", n.name, i, n.Replica.State())
		}
	}
	records, err := c.nodes[0].Records(ctx, c.nodes[0].keyring())
	if err != nil || len(records) != 3 {
		t.Errorf("%d records, %v", len(records), err)
	}
}

// TestChange: a node makes a change in the store first (rule 1).
func TestChange(t *testing.T) {
	c := open(t)
	n := c.nodes[1]
	must(t, n.change())
	b, err := c.store.Load(ctx)
	if err != nil || !bytes.Equal(b, n.keyring().Shared()) {
		t.Error("the store does not hold the change")
	}
	before := c.nodes[2].keyring().Revision()
	if err := c.nodes[2].change(); !errors.Is(err, store.ErrConflict) || seal.CauseOf(err) != seal.CauseStore {
		t.Errorf("a change on a node that is not in step: %v", err)
	}
	if c.nodes[2].keyring().Revision() != before {
		t.Error("the refused change was made")
	}
	c.store.SetDown(errDown)
	file := n.file.b
	if err := n.change(); seal.CauseOf(err) != seal.CauseUnavailable {
		t.Errorf("a change without the store: %v", err)
	}
	if !bytes.Equal(n.file.b, file) {
		t.Error("the node saved what is not in the store")
	}
	must(t, n.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) { // I10
		next, err := k.WithOwnSlots(append(k.OwnSlots(), k.OwnSlots()...), nil)
		return []*keyring.Keyring{next}, err
	}))
	if bytes.Equal(n.file.b, file) {
		t.Error("a change of the own section was not saved")
	}
}

// TestLostAnswer: a change whose answer was lost counts as made, and every node takes it.
func TestLostAnswer(t *testing.T) {
	c := open(t)
	c.store.LoseAnswer()
	revision := c.nodes[0].keyring().Revision()
	if err := c.nodes[0].change(); seal.CauseOf(err) != seal.CauseUnavailable {
		t.Error(err)
	}
	if c.nodes[0].keyring().Revision() != revision {
		t.Error("the node took an uncertain change")
	}
	c.settle(t)
	for _, n := range c.nodes {
		if n.keyring().Revision() != revision+1 {
			t.Errorf("node %s has revision %d", n.name, n.keyring().Revision())
		}
	}
}

// TestRestored: after the store was restored from a snapshot the highest node publishes
// (rule 9).
func TestRestored(t *testing.T) {
	c := open(t)
	restore := c.store.Snapshot()
	c.rotate(t, 0)
	id := c.nodes[0].keyring().CurrentID()
	restore()
	if err := c.nodes[1].change(); !errors.Is(err, store.ErrConflict) {
		t.Errorf("a change from what was restored away: %v", err)
	}
	c.settle(t)
	for _, n := range c.nodes {
		if got := n.keyring().CurrentID(); got != id {
			t.Errorf("node %s: %s, want %s", n.name, got, id)
		}
	}
	if b, err := c.store.Load(ctx); err != nil || !bytes.Equal(b, c.nodes[0].keyring().Shared()) {
		t.Errorf("the store does not hold the highest keyring: %v", err)
	}
}

// TestFork: neither of two keyrings of one revision is overwritten, and both nodes report
// the fork.
func TestFork(t *testing.T) {
	c := open(t)
	restore := c.store.Snapshot()
	must(t, c.nodes[0].change())
	restore()
	must(t, c.nodes[1].Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := k.WithoutNode("c")
		return []*keyring.Keyring{next}, err
	}))
	b, err := c.store.Load(ctx)
	must(t, err)
	if err := c.nodes[0].Sync(ctx); seal.CauseOf(err) != seal.CauseForked {
		t.Errorf("a fork: %v", err)
	}
	if s := c.nodes[0].Replica.State(); seal.CauseOf(s.Problem) != seal.CauseForked || s.InStep {
		t.Errorf("%+v", s)
	}
	if now, err := c.store.Load(ctx); err != nil || !bytes.Equal(now, b) {
		t.Error("the fork was overwritten")
	}
}

// TestRemoved: a node that is no longer listed goes on serving, and locks at its
// next start (rule 12).
func TestRemoved(t *testing.T) {
	c := open(t)
	must(t, c.nodes[0].Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := k.WithoutNode("c")
		return []*keyring.Keyring{next}, err
	}))
	gone := c.nodes[2]
	if err := gone.Sync(ctx); seal.CauseOf(err) != seal.CauseNodeRemoved {
		t.Error(err)
	}
	gone.keyring()
	gone.start()
	if err := gone.Sync(ctx); seal.CauseOf(err) != seal.CauseNodeRemoved {
		t.Error(err)
	}
	if _, err := gone.Unlocker.Keyring(); seal.CauseOf(err) != seal.CauseNodeRemoved {
		t.Errorf("a removed node after its start: %v", err)
	}
}

// TestRemovedLog: a removed node says that it goes on serving only while it does.
func TestRemovedLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t)
		gone := c.nodes[2]
		var log bytes.Buffer
		gone.log = slog.NewTextHandler(&log, nil)
		said := func() bool {
			log.Reset()
			run, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			gone.Replica.Run(run)
			return strings.Contains(log.String(), "keeps serving")
		}
		gone.start()
		if said() {
			t.Errorf("it is in step: %s", log.String())
		}
		must(t, c.nodes[0].Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
			next, err := k.WithoutNode("c")
			return []*keyring.Keyring{next}, err
		}))
		if !said() {
			t.Errorf("it was removed while it serves: %s", log.String())
		}
		gone.start()
		if said() {
			t.Errorf("it is locked since its start: %s", log.String())
		}
	})
}

// TestRemovedAndRotated: the other nodes have a KEK that the removed node does not know,
// so the removed node can't verify their keyring. It still knows that it was removed,
// even after a restart, until it has joined again.
func TestRemovedAndRotated(t *testing.T) {
	c := open(t)
	gone := c.nodes[2]
	before := gone.file.b
	must(t, c.nodes[0].Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := k.WithoutNode("c")
		return []*keyring.Keyring{next}, err
	}))
	if err := gone.Sync(ctx); seal.CauseOf(err) != seal.CauseNodeRemoved {
		t.Error(err)
	}
	stay := &cluster{store: c.store, nodes: c.nodes[:2]}
	stay.rotate(t, 0)
	for range 2 {
		if err := gone.Sync(ctx); seal.CauseOf(err) != seal.CauseNodeRemoved {
			t.Error(err)
		}
		gone.keyring()
	}
	if gone.file.b != nil && !bytes.Equal(gone.file.b, before) {
		t.Error("the removed node has changed its keyring")
	}
	gone.start()
	if err := gone.Sync(ctx); seal.CauseOf(err) != seal.CauseNodeRemoved {
		t.Error(err)
	}
	if _, err := gone.Unlocker.Keyring(); seal.CauseOf(err) != seal.CauseNodeRemoved {
		t.Errorf("a removed node after its start: %v", err)
	}
	// A removal that is older than the node's keyring does not count.
	c.nodes[1].removal = gone.removal
	c.nodes[1].start()
	b, err := c.store.Load(ctx)
	must(t, err)
	must(t, c.store.Swap(ctx, b, []byte("damaged")))
	if err := c.nodes[1].Sync(ctx); err == nil || seal.CauseOf(err) == seal.CauseNodeRemoved {
		t.Error(err)
	}
	c.nodes[1].keyring()
}

// TestRemovalUndone: the machine that removed a node dies before it has stored the keyring,
// and the store is restored. The node that heard of its removal is a node again, and without
// the API its next start does not lock.
func TestRemovalUndone(t *testing.T) {
	c := open(t)
	a, gone := c.nodes[0], c.nodes[2]
	restore := c.store.Snapshot()
	a.file.dies = true
	_ = a.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := k.WithoutNode("c")
		return []*keyring.Keyring{next}, err
	})
	if err := gone.Sync(ctx); seal.CauseOf(err) != seal.CauseNodeRemoved {
		t.Fatal(err)
	}
	if gone.removal.b == nil {
		t.Fatal("the node does not record its removal")
	}
	restore()
	a.start()
	for range 2 {
		for _, n := range c.nodes {
			must(t, n.Sync(ctx))
		}
	}
	if gone.removal.b != nil {
		t.Error("the node still has the record of its removal")
	}
	c.store.SetDown(errDown)
	gone.start()
	_ = gone.Sync(ctx)
	gone.keyring()
}

// TestRotation: every node follows, no key ID flips back, and a rotation waits for a node
// that is away, and names it. The KEK is not activated before that node is back.
func TestRotation(t *testing.T) {
	c := open(t)
	a, away := c.nodes[0], c.nodes[2]
	former := a.keyring().CurrentID()
	step, err := a.driver().Advance(ctx, former)
	if err != nil || step.Do != rotation.Stage {
		t.Fatalf("%+v, %v", step, err)
	}
	for range 3 {
		must(t, a.Sync(ctx))
		must(t, c.nodes[1].Sync(ctx))
	}
	step, err = c.nodes[1].driver().Advance(ctx, former) // another node takes over
	if err != nil || step.Do != rotation.Wait || rotation.Describe(step.Missing) != "node c: "+string(rotation.WhyNoRecord) {
		t.Errorf("%+v, %v", step, err)
	}
	err = a.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) { // rule 5, for any caller
		next, err := k.Activate(now)
		return []*keyring.Keyring{next}, err
	})
	if err == nil || !strings.Contains(err.Error(), "before every node has acknowledged it: node c") {
		t.Errorf("activated without node c: %v", err)
	}
	away.wrapper.err = seal.Errorf(seal.CauseLockout, "wait", "the TPM is locked out")
	if err := away.Sync(ctx); seal.CauseOf(err) != seal.CauseLockout {
		t.Errorf("a node whose TPM is locked out: %v", err)
	}
	if step, err = a.driver().Advance(ctx, former); err != nil || rotation.Describe(step.Missing) != "node c: "+string(rotation.WhyNotAcknowledged) {
		t.Errorf("%+v, %v", step, err)
	}
	away.wrapper.err = nil
	must(t, away.Sync(ctx))
	if step, err = a.driver().Advance(ctx, former); err != nil || step.Do != rotation.Activate {
		t.Errorf("%+v, %v", step, err)
	}
	c.settle(t)
	if step, err = a.driver().Advance(ctx, former); err != nil || step.Do != rotation.Settled {
		t.Errorf("%+v, %v", step, err)
	}
	for _, n := range c.nodes {
		n.start()
		if id := n.keyring().CurrentID(); id == former {
			t.Errorf("node %s is on the former KEK", n.name)
		}
	}
}

// TestAbort retires the staged KEK on every node.
func TestAbort(t *testing.T) {
	c := open(t)
	former := c.nodes[0].keyring().CurrentID()
	_, err := c.nodes[0].driver().Advance(ctx, former)
	must(t, err)
	staged := c.nodes[0].keyring().StagedID()
	c.settle(t)
	must(t, c.nodes[1].driver().Abort(ctx))
	c.settle(t)
	for _, n := range c.nodes {
		if k := n.keyring(); k.StagedID() != "" || k.CurrentID() != former || !k.Holds(staged) {
			t.Errorf("node %s: %+v", n.name, k.Info())
		}
	}
}

// TestForged: an attacker who knows a retired KEK can't make a node follow a forged
// keyring.
func TestForged(t *testing.T) {
	c := open(t)
	old, err := keyring.Parse(c.nodes[0].keyring().Shared())
	must(t, err)
	var known *seal.Secret
	c.nodes[0].keyring().KEK().With(func(b []byte) { known, err = seal.Memory{}.Take(bytes.Clone(b)) })
	must(t, err)
	intruder, err := old.Open(known, nil)
	must(t, err)
	defer intruder.Close()
	c.rotate(t, 0)
	forged, err := intruder.AtLeast(1000)
	must(t, err)
	defer forged.Close()
	for _, b := range [][]byte{forged.Shared(), []byte("{}\n"), nil, bytes.Repeat([]byte("x"), 2<<20)} {
		c.store.Write(b)
		for _, n := range c.nodes {
			before := n.keyring().CurrentID()
			_ = n.Sync(ctx)
			if n.keyring().CurrentID() != before || n.keyring().Revision() >= 1000 {
				t.Errorf("node %s follows a forged keyring", n.name)
			}
		}
	}
}

// TestPruned: a store that was restored from before a prune holds a keyring under a KEK
// that no node knows. The nodes name the archive that brings the KEK back, if they find one
// that their keyring vouches for.
func TestPruned(t *testing.T) {
	archive := func(c *cluster, id seal.KeyID) []byte {
		b, err := keyring.Archive(c.nodes[0].keyring(), id, []seal.Slot{{Type: seal.TypeRecovery, Data: []byte("{}")}})
		must(t, err)
		return b
	}
	c, other := open(t), open(t)
	former, others := c.nodes[0].keyring().CurrentID(), other.nodes[0].keyring().CurrentID()
	restore := c.store.Snapshot()
	c.rotate(t, 0)
	other.rotate(t, 0)
	real, foreign := archive(c, former), archive(other, others)
	must(t, c.nodes[0].Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := k.Prune(former)
		return []*keyring.Keyring{next}, err
	}))
	c.settle(t)
	restore()
	n := c.nodes[1]
	for _, row := range []struct {
		archives   map[string][]byte
		says, hint string
	}{
		{nil, "never acknowledged", "kleidi keyring import-archive FILE"},
		{map[string][]byte{"FILE.json": foreign, "k1-none": nil}, "never acknowledged", "kleidi keyring import-archive FILE"},
		{map[string][]byte{"FILE.json": real, "k1-none": nil}, "whose KEK this cluster has pruned", "kleidi keyring import-archive FILE.json and"},
		{map[string][]byte{"FILE.json": real, string(former): real}, "whose KEK this cluster has pruned", "kleidi keyring import-archive " + string(former)},
	} {
		n.archives = row.archives
		err := n.Sync(ctx)
		var cause *seal.Error
		if !errors.As(err, &cause) || cause.Cause != seal.CauseAnchor || !strings.Contains(err.Error(), row.says) || !strings.Contains(cause.Hint, row.hint) {
			t.Errorf("with %d archives: %v (%+v), want %q and %q", len(row.archives), err, cause, row.says, row.hint)
		}
	}
}

// TestLook: one of several nodes waits for the store before it announces a key ID, but
// not if the store refuses connections (rule 13).
func TestLook(t *testing.T) {
	c := open(t)
	n := c.nodes[0]
	n.start()
	if !replica.Monotonic(n.Replica) { // the clock of synctest, in TestLookEnds, does not tell
		t.Error("Look measures its time by the wall clock")
	}
	ended := make(chan struct{})
	go func() {
		n.Look(ctx)
		close(ended)
	}()
	select {
	case <-ended:
		t.Fatal("Look does not wait")
	case <-time.After(50 * time.Millisecond):
	}
	c.store.SetDown(errDown) // connected, but no answer
	_ = n.Sync(ctx)
	select {
	case <-ended:
		t.Fatal("Look does not wait for a store that accepts connections")
	case <-time.After(50 * time.Millisecond):
	}
	c.store.SetDown(syscall.ECONNREFUSED)
	_ = n.Sync(ctx)
	select {
	case <-ended:
	case <-time.After(2 * time.Minute):
		t.Fatal("Look waits for a store that refuses connections")
	}
}

// TestLookEnds: a store that accepts connections and does not answer delays the first
// announcement by seconds, even if the wall clock was set back by a day meanwhile (I9).
func TestLookEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t)
		n := c.nodes[0]
		c.store.SetDown(errDown)
		n.start()
		replica.SetClockBack(n.Replica, 24*time.Hour)
		start := time.Now()
		n.Look(ctx)
		if d := time.Since(start); d < time.Second || d > 10*time.Second {
			t.Errorf("Look took %s", d)
		}
	})
}

// TestRun: the watch tells a running node of a change at once.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t)
		run, cancel := context.WithCancel(ctx)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			c.nodes[1].Replica.Run(run)
		}()
		synctest.Wait()
		began := time.Now()
		must(t, c.nodes[0].change())
		synctest.Wait() // no time passes before all is quiet
		if want := c.nodes[0].keyring().Revision(); c.nodes[1].keyring().Revision() != want || time.Since(began) != 0 {
			t.Errorf("revision %d, want %d, after %s", c.nodes[1].keyring().Revision(), want, time.Since(began))
		}
		cancel()
		<-ended
	})
}

// rarely is a store whose watch never tells of anything. It notes when it is read.
type rarely struct {
	replica.Store
	reads []time.Time
}

// Load implements replica.Store.
func (s *rarely) Load(ctx context.Context) ([]byte, error) {
	s.reads = append(s.reads, time.Now())
	return s.Store.Load(ctx)
}

// Watch implements replica.Store.
func (s *rarely) Watch(ctx context.Context, _ func()) { <-ctx.Done() }

// TestRunPace: without a word from the watch a node reads the store every half minute. It
// reads the store again after a second, and then less and less often, if the store did not
// answer, or if another node has not followed yet. The log says once how things stand.
func TestRunPace(t *testing.T) {
	for name, row := range map[string]struct {
		down   error
		behind bool
		first  time.Duration // the longest time to the second read
	}{
		"in step":                   {nil, false, 30 * time.Second},
		"no answer":                 {errDown, false, 2 * time.Second},
		"another node is not there": {nil, true, 2 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			c := open(t)
			n := c.nodes[0]
			if row.behind {
				must(t, n.change())
			}
			c.store.SetDown(row.down)
			store, log := &rarely{Store: c.store}, &bytes.Buffer{}
			n.Replica = replica.New(replica.Config{Store: store, Unlocker: n.Unlocker, Log: slog.New(slog.NewTextHandler(log, nil))})
			began := time.Now()
			run, cancel := context.WithTimeout(ctx, 10*time.Minute)
			defer cancel()
			n.Replica.Run(run)
			if len(store.reads) < 15 || len(store.reads) > 60 {
				t.Fatalf("%s: %d reads in ten minutes", name, len(store.reads))
			}
			if said := strings.Count(log.String(), "in step with the cluster store"); said != 1 || strings.Contains(log.String(), "not in step") != (row.down != nil) {
				t.Errorf("%s: not said once in the log:\n%s", name, log)
			}
			var gaps []time.Duration
			last := began
			for _, at := range store.reads {
				if at != last { // a round reads more than once
					gaps = append(gaps, at.Sub(last))
				}
				last = at
			}
			if early := row.first < 30*time.Second; gaps[0] > row.first || early == (gaps[0] > 2*time.Second) || gaps[len(gaps)-1] < 10*time.Second || gaps[len(gaps)-1] > 50*time.Second {
				t.Errorf("%s: %v", name, gaps)
			}
		})
	}
}
