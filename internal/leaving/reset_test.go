package leaving

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
)

// TestToForget: a machine that never was a node has nothing to forget; a damaged keyring is
// something, and the operator is told that it can't be read.
func TestToForget(t *testing.T) {
	cfg := config.Default()
	cfg.Node, cfg.State.Dir = "cp-1", filepath.Join(t.TempDir(), "state")
	n, err := node.New(cfg, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	f, err := ToForget(t.Context(), n)
	if err != nil || !f.Nothing() {
		t.Errorf("%+v, %v", f, err)
	}
	if err := os.WriteFile(cfg.Keyring(), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err = ToForget(t.Context(), n)
	if err != nil || f.Nothing() || len(f.copies) != 0 {
		t.Errorf("%+v, %v", f, err)
	}
	if lines := f.Describe(n); !strings.Contains(lines[0], "cp-1 has no keyring that can be read") {
		t.Errorf("%q", lines)
	}
	last := f.files[len(f.files)-1]
	if len(last.paths) != 1 || last.paths[0] != cfg.Keyring() {
		t.Errorf("the keyring must go last: %q", last.paths)
	}
}
