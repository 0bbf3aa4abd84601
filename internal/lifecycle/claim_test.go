package lifecycle

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal/store"
)

// TestReplaceAlone: recover and restore take the state folder before they look at anything.
// Beside another process that has it, they don't read the request, open no slot and raise no
// counter of the TPM.
func TestReplaceAlone(t *testing.T) {
	cfg := config.Default()
	cfg.Node, cfg.State.Dir = "cp-1", filepath.Join(t.TempDir(), "state")
	cfg.Admin.Socket = filepath.Join(t.TempDir(), "admin.sock")
	n, err := node.New(cfg, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	replace := map[string]func() error{
		"recover": func() error {
			_, err := Recover(t.Context(), n, admin.RecoverRequest{Identity: []byte("no identity")})
			return err
		},
		"restore": func() error {
			_, err := Restore(t.Context(), n, admin.RestoreRequest{Keyring: []byte("no keyring")})
			return err
		},
	}
	if err := store.PrepareDir(cfg.State.Dir); err != nil {
		t.Fatal(err)
	}
	other, err := store.LockDir(cfg.State.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for verb, replace := range replace {
		if err := replace(); !errors.Is(err, store.ErrLocked) {
			t.Errorf("%s beside another process: %v", verb, err)
		}
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	held := func() (admin.KeyringState, error) {
		if n.Replacing.TryLock() {
			t.Error("another replacement may run at the same time")
		}
		if !n.State.Held() {
			t.Error("the state folder isn't taken")
		}
		return admin.KeyringState{}, nil
	}
	if _, err := replaceKeyring(t.Context(), n, held); err != nil || n.State.Held() {
		t.Errorf("without a keyring afterwards: %v; the folder is left to init: %v", err, !n.State.Held())
	}
	if err := os.WriteFile(cfg.Keyring(), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := replaceKeyring(t.Context(), n, held); err != nil || !n.State.Held() {
		t.Errorf("with a keyring afterwards: %v; the folder is kept: %v", err, n.State.Held())
	}
}
