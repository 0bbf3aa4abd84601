package lifecycle

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/config"
)

// TestReadBackup: a file that is no keyring, and a state folder without a previous
// revision, are refused with what to name instead.
func TestReadBackup(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keyring.json")
	if _, err := ReadBackup(file); err == nil {
		t.Error("a missing file was read")
	}
	if err := os.WriteFile(file, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadBackup(file); err == nil || !strings.HasPrefix(err.Error(), file+": ") {
		t.Error(err)
	}
	if _, err := RolesIn(file); err == nil || !strings.HasPrefix(err.Error(), file+": ") {
		t.Error(err)
	}
	cfg := config.Default()
	cfg.State.Dir = t.TempDir()
	if _, err := ReadPrevious(t.Context(), cfg); err == nil || !strings.HasPrefix(err.Error(), "there is no previous revision: ") {
		t.Error(err)
	}
}
