package powerloss_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/beezy-dev/kleidi/internal/powerloss"
)

// TestCut: the disk keeps the flushed data, and nothing else.
func TestCut(t *testing.T) {
	dir := t.TempDir()
	disk := powerloss.New(t, dir)
	flushed, unflushed := filepath.Join(dir, "flushed"), filepath.Join(dir, "unflushed")
	f, err := os.Create(flushed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("content"); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(unflushed, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // what survived once survives again
		disk.Cut()
		if b, err := os.ReadFile(flushed); err != nil || string(b) != "content" {
			t.Errorf("the flushed file is %q, %v", b, err)
		}
		if _, err := os.Stat(unflushed); !os.IsNotExist(err) {
			t.Errorf("the file that was not flushed is still there: %v", err)
		}
	}
}
