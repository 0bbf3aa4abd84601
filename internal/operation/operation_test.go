package operation

import (
	"context"
	"errors"
	"math"
	"path/filepath"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/seal/store"
)

// elsewhere is an amendment: the admin socket is in a folder of the test, and nothing
// answers on it.
func elsewhere(t *testing.T) func(*config.Config) {
	socket := filepath.Join(t.TempDir(), "admin.sock")
	return func(c *config.Config) { c.Admin.Socket = socket }
}

// TestAlone: without serve, an operation that needs the open keyring takes the state
// folder and opens the keyring before it works. Other operations work on the keyring as
// it is.
func TestAlone(t *testing.T) {
	for name, row := range map[string]struct {
		keyring      expectation
		locked       bool // another process has the folder
		works, alone bool // which of the two functions runs
	}{
		"as it is":         {asItIs, false, true, false},
		"as it is, locked": {asItIs, true, true, false},
		"seen, locked":     {seen, true, true, false},
		"open":             {open, false, false, false}, // there is no keyring
		"open, locked":     {open, true, false, false},
		"its own way":      {asItIs, false, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			n := nodetest.New(t, elsewhere(t))
			if row.locked {
				if err := store.PrepareDir(n.Config.State.Dir); err != nil {
					t.Fatal(err)
				}
				lock, err := store.LockDir(n.Config.State.Dir)
				if err != nil {
					t.Fatal(err)
				}
				defer lock.Close()
			}
			var works, alone bool
			o := Operation[int, int]{keyring: row.keyring, work: func(context.Context, *node.Node, int) (int, error) { works = true; return 1, nil }}
			if row.alone {
				o.alone = func(context.Context, *node.Node, int) (int, error) { alone = true; return 1, nil }
			}
			got, err := o.Alone(t.Context(), n, 0)
			if works != row.works || alone != row.alone || (err == nil) != (works || alone) || (got == 1) != (err == nil) {
				t.Errorf("works %v, alone %v: %d, %v", works, alone, got, err)
			}
			if row.locked && row.keyring == open && !errors.Is(err, store.ErrLocked) {
				t.Error(err)
			}
		})
	}
}

// fastest returns the shortest time of several tries, of which a busy machine may delay some.
func fastest(try func()) time.Duration {
	least := time.Duration(math.MaxInt64)
	for range 5 {
		start := time.Now()
		try()
		least = min(least, time.Since(start))
	}
	return least
}

// TestFirstAttempt: an operation waits for the first attempt to unlock only as long as its
// caller does.
func TestFirstAttempt(t *testing.T) {
	n := nodetest.New(t, elsewhere(t))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if waited := fastest(func() { awaitFirstAttempt(ctx, n) }); waited >= firstAttempt {
		t.Errorf("it waits %v for a caller that has gone away", waited)
	}
	if err := n.Unlocker.Unlock(t.Context()); err == nil {
		t.Fatal("there is a keyring")
	}
	select {
	case <-n.Unlocker.Tried():
	default:
		t.Error("an attempt that failed doesn't count as one")
	}
}
