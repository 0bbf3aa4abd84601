package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/unlock"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/predict"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestTidyWaitsForTheOpening: the clean-up is told of an opening a moment before
// the keyring is open to it, and must not take that for a locked one.
func TestTidyWaitsForTheOpening(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	cfg := config.Default()
	cfg.Node, cfg.State.Dir = "cp-1", filepath.Join(t.TempDir(), "state")
	cfg.TPM.Device, cfg.TPM.EventLog, cfg.TPM.UserspaceEventLog = m.Device(), m.EventLog(), m.UserspaceLog()
	next := simboot.Baseline(simboot.UKI)
	next.Kernel = "6.13.1"
	sealToNext(t, cfg, next)
	m.Reboot(next)

	s := &server{opened: make(chan struct{}, 1)}
	var err error
	s.node, err = newNode(cfg, slog.New(slog.DiscardHandler), func(seal.Cause, unlock.Timing) {
		s.opened <- struct{}{}
		<-time.After(100 * time.Millisecond) // in which a clean-up that does not wait gives up
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.node.close()
	if err := s.node.own(); err != nil {
		t.Fatal(err)
	}
	go s.tidyUp(t.Context())
	if err := s.node.unlocker.Unlock(t.Context()); err != nil {
		t.Fatal(err)
	}
	err = eventually(func() error {
		k, err := s.node.unlocker.Keyring()
		if err == nil && len(s.node.states(k.Slots(), tpm.UseNext)) > 0 {
			err = os.ErrDeadlineExceeded
		}
		return err
	})
	if err != nil {
		t.Errorf("the boot before the update still opens: %v", err)
	}
}

// sealToNext makes a keyring that is sealed to another boot besides.
func sealToNext(t *testing.T, cfg *config.Config, next simboot.Boot) {
	t.Helper()
	n, err := newNode(cfg, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer n.close()
	identity, recipient, err := recovery.GenerateIdentity(n.mem)
	if err != nil {
		t.Fatal(err)
	}
	identity.Close()
	if _, err := n.initialize(t.Context(), initOptions{Recipients: []string{recipient}}); err != nil {
		t.Fatal(err)
	}
	files, err := next.Files()
	if err != nil {
		t.Fatal(err)
	}
	p, err := n.predict(t.Context(), predict.Change{Next: predict.Files{UKI: files.UKI}})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(p.moved, []int{4, 11}) {
		t.Fatalf("PCRs %v move", p.moved)
	}
	if err := n.unlocker.Unlock(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := n.resealNext(t.Context(), admin.BootState{Bank: cfg.TPM.Bank, PCRs: p.state.Values, Record: p.state.Record}, false); err != nil {
		t.Fatal(err)
	}
}
