package replica_test

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/beezy-dev/kleidi/seal/keyring"
)

// TestBootStates: a node asks its TPM for its boot states once, and again only when its own
// slots have changed or after the TPM has failed. Its record has the last ones.
func TestBootStates(t *testing.T) {
	c := open(t)
	n := c.nodes[0]
	asked, epoch, fails := 0, uint64(1), error(nil)
	n.states = func(context.Context, *keyring.Keyring) ([]keyring.RecordedState, error) {
		asked++
		if fails != nil {
			return nil, fails
		}
		return []keyring.RecordedState{{Bank: "sha256", PCRs: map[string]string{"7": strings.Repeat("0", 64)}, AtMost: epoch}}, nil
	}
	n.start()
	recorded := func(want uint64, times int) {
		t.Helper()
		r := own(n)
		if r.Record == nil || len(r.Record.BootStates) != 1 || r.Record.BootStates[0].AtMost != want || asked != times {
			t.Errorf("asked %d times, want %d; the record is %+v, want epoch %d", asked, times, r.Record, want)
		}
	}
	fails = errors.New("the TPM is away")
	if err := n.Sync(ctx); !errors.Is(err, fails) {
		t.Errorf("the TPM fails: %v", err)
	}
	fails, asked = nil, 0
	must(t, n.Sync(ctx))
	recorded(1, 1)
	epoch = 2 // the node's slots are the same, so they still bind it as before
	must(t, n.change())
	must(t, n.Sync(ctx))
	recorded(1, 1)
	c.rotate(t, 0)
	must(t, n.Sync(ctx))
	if asked == 1 {
		t.Error("the node's slots have changed, and it has not asked")
	}
	recorded(2, asked)
}

// TestSyncAwaitsUnlock: an attempt to unlock kicks a round at its end, before the keyring can
// be seen. That round waits for the attempt, and does not miss the keyring.
func TestSyncAwaitsUnlock(t *testing.T) {
	c := open(t)
	n := c.nodes[1]
	trying, held := make(chan struct{}), make(chan struct{})
	goOn := sync.OnceFunc(func() { close(held) })
	t.Cleanup(goOn) // or the cluster does not end
	n.wrapper.unwrapping = func() {
		n.wrapper.unwrapping = nil
		close(trying)
		<-held
	}
	started, synced := make(chan struct{}), make(chan error, 1)
	go func() {
		defer close(started)
		n.start()
	}()
	<-trying
	go func() { synced <- n.Sync(ctx) }()
	for stacks := make([]byte, 1<<20); !strings.Contains(string(stacks[:runtime.Stack(stacks, true)]), "unlock.AwaitAttempt("); runtime.Gosched() {
		select {
		case err := <-synced:
			t.Fatalf("the round does not wait for the attempt: %v", err)
		default:
		}
	}
	goOn()
	<-started
	if err := <-synced; err != nil || !n.Replica.State().InStep {
		t.Errorf("after the attempt: in step: %v, %v", n.Replica.State().InStep, err)
	}
}
