package serve

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/foundingtest"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/unlock"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/predict"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestTidyWaitsForTheOpening: the clean-up learns of an opening a moment before it can
// use the open keyring, and must not take the keyring for a locked one.
func TestTidyWaitsForTheOpening(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	cfg := config.Default()
	cfg.Node, cfg.State.Dir = "cp-1", filepath.Join(t.TempDir(), "state")
	cfg.TPM.Device, cfg.TPM.EventLog, cfg.TPM.UserspaceEventLog = m.Device(), m.EventLog(), m.UserspaceLog()
	next := simboot.Baseline(simboot.UKI)
	next.Kernel = "6.13.1"
	sealToNext(t, cfg, next)
	m.Reboot(next)

	s := &Server{opened: make(chan struct{}, 1)}
	var err error
	s.Node, err = node.New(cfg, slog.New(slog.DiscardHandler), func(seal.Cause, unlock.Timing) {
		s.opened <- struct{}{}
		<-time.After(100 * time.Millisecond) // a clean-up that does not wait gives up in this time
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Node.Close()
	if err := s.Node.AcquireState(); err != nil {
		t.Fatal(err)
	}
	go s.tidyUp(t.Context())
	if err := s.Node.Unlocker.Unlock(t.Context()); err != nil {
		t.Fatal(err)
	}
	err = waitUntil(t, func() error {
		k, err := s.Node.Unlocker.Keyring()
		if err == nil && len(s.Node.View.BootStates(k.Slots(), tpm.UseNext)) > 0 {
			err = os.ErrDeadlineExceeded
		}
		return err
	})
	if err != nil {
		t.Errorf("the boot before the update still opens: %v", err)
	}
}

// sealToNext makes a keyring that is also sealed to another boot.
func sealToNext(t *testing.T, cfg *config.Config, next simboot.Boot) {
	t.Helper()
	n, err := node.New(cfg, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	foundingtest.Found(t, n)
	files, err := next.Files()
	if err != nil {
		t.Fatal(err)
	}
	p, err := reseal.Predict(t.Context(), n, predict.Change{Next: predict.Files{UKI: files.UKI}})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(p.Moved, []int{4, 11}) {
		t.Fatalf("PCRs %v move", p.Moved)
	}
	if err := n.Unlocker.Unlock(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := reseal.Next(t.Context(), n, admin.ResealRequest{Next: &admin.BootState{Bank: cfg.TPM.Bank, PCRs: p.State.Values, Record: p.State.Record}}); err != nil {
		t.Fatal(err)
	}
}

// waitUntil waits until ready returns nil, and returns its error if it does not.
func waitUntil(t *testing.T, ready func() error) error {
	t.Helper()
	timeout := time.After(2 * time.Minute)
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-timeout:
			return err
		case <-time.After(5 * time.Millisecond):
		}
	}
}
