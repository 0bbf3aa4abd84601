package leaving

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/node/nodetest"
)

// TestToForget: a machine that never was a node has nothing to forget. A damaged keyring
// counts, and the operator is told that it can't be read.
func TestToForget(t *testing.T) {
	n := nodetest.New(t)
	cfg := n.Config
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
	if lines := f.Describe(n); !strings.Contains(lines[0], "cp-1 has no readable keyring") {
		t.Errorf("%q", lines)
	}
	last := f.files[len(f.files)-1]
	if len(last.paths) != 1 || last.paths[0] != cfg.Keyring() {
		t.Errorf("the keyring must go last: %q", last.paths)
	}
}

// TestResetRepeats: without the TPM, a reset removes every file of the keyring, warns that
// copies still open, and finds nothing to do when it is repeated.
func TestResetRepeats(t *testing.T) {
	n := nodetest.New(t)
	cfg := n.Config
	if err := os.Mkdir(cfg.State.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	files := []string{cfg.Keyring(), cfg.AnchorPath(), cfg.SlotRecord(), cfg.BootStates(), cfg.Removal(), filepath.Join(cfg.State.Dir, "pin.json")}
	kept := filepath.Join(cfg.State.Dir, "ak.json") // belongs to the TPM, not to the keyring
	for _, path := range append(files, kept) {
		if err := os.WriteFile(path, []byte("damaged"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		removed int
		says    string
	}{{len(files), "COPIES OF THIS NODE'S TPM SLOTS STILL OPEN"}, {0, "no file of a keyring was here"}} {
		f, err := ToForget(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		r, err := Reset(t.Context(), n, f, true)
		if err != nil || len(r.Removed) != step.removed || !strings.Contains(strings.Join(r.Changes, "\n"), step.says) {
			t.Errorf("%+v, %v", r, err)
		}
	}
	for _, path := range files {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s stays", path)
		}
	}
	if _, err := os.Lstat(kept); err != nil {
		t.Error(err)
	}
}
