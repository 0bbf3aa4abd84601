//go:build cgo

package founding

import (
	"crypto/rand"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/sealtest"
)

// TestImportLeavesNoPIN: no copy of a config.json's PIN stays on the heap, however long
// the file is.
func TestImportLeavesNoPIN(t *testing.T) {
	pin, err := seal.Memory{}.New(40)
	if err != nil {
		t.Fatal(err)
	}
	defer pin.Close()
	path := filepath.Join(t.TempDir(), "config.json")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	write := func(b []byte) {
		if _, err := f.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	write([]byte(`{"pin": "`))
	pin.With(func(b []byte) {
		rand.Read(b)
		for i := range b {
			b[i] = 'a' + b[i]%26
		}
		write(b)
	})
	write([]byte(`", "path": "/lib/module.so", "tokenLabel": "kleidi"` + strings.Repeat(" ", 8<<10) + "}"))
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}

	cfg := config.Default()
	cfg.State.Dir = t.TempDir()
	i, err := ReadImport(path, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer i.pin.Close()
	n, err := node.New(cfg, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := useToken(n, i); err != nil {
		t.Fatal(err)
	}
	if !i.pin.Equal(pin) {
		t.Fatal("another PIN is read")
	}
	watch := sealtest.NewWatch()
	watch.Add("the PIN", pin)
	watch.Add("the PIN", i.pin)
	if found := watch.Find(t); len(found) > 0 {
		t.Errorf("copies stay: %v", found)
	}
}
