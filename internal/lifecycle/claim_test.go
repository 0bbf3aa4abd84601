package lifecycle

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/seal/store"
)

// TestReplaceAlone: recover and restore take the state folder before they look at
// anything. While another process holds the folder, they don't read the request, open no
// slot and raise no counter of the TPM.
func TestReplaceAlone(t *testing.T) {
	n := nodetest.New(t, func(c *config.Config) { c.Admin.Socket = filepath.Join(t.TempDir(), "admin.sock") })
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
	if err := store.PrepareDir(n.Config.State.Dir); err != nil {
		t.Fatal(err)
	}
	other, err := store.LockDir(n.Config.State.Dir)
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
	if err := os.WriteFile(n.Config.Keyring(), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := replaceKeyring(t.Context(), n, held); err != nil || !n.State.Held() {
		t.Errorf("with a keyring afterwards: %v; the folder is kept: %v", err, n.State.Held())
	}
}
