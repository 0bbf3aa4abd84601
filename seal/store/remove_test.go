package store

import (
	"os"
	"path/filepath"
	"testing"
)

// TestRemove: Remove leaves no file, whatever a crash or an earlier version left behind.
func TestRemove(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	f := NewFile(filepath.Join(dir, "anchor.json")).Formerly("pin.json")
	for _, name := range []string{"anchor.json", "anchor.json.previous", "pin.json", "pin.json.previous", f.temporaryPrefix() + "x", "other"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := f.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 || left[0].Name() != "other" {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := NewFile(filepath.Join(dir, "none", "f")).Remove(t.Context()); err == nil {
		t.Error("a file in no folder is removed")
	}
}
