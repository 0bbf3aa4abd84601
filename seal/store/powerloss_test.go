package store_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/beezy-dev/kleidi/internal/powerloss"
	"github.com/beezy-dev/kleidi/seal/store"
)

// TestPowerLossAfterSave cuts the power right after each save. The saved content
// and the previous one are then on the disk, and so is the folder that PrepareDir
// created.
func TestPowerLossAfterSave(t *testing.T) {
	mount := t.TempDir()
	disk := powerloss.New(t, mount)
	dir := filepath.Join(mount, "state")
	if err := store.PrepareDir(dir); err != nil {
		t.Fatal(err)
	}
	disk.Cut()
	if _, err := os.Stat(dir); err != nil {
		t.Fatalf("the folder is gone: %v", err)
	}
	f := store.NewFile(filepath.Join(dir, "keyring.json"))
	var version store.Version
	for n := 1; n <= 3; n++ {
		saved, err := f.Save(t.Context(), content(n), version)
		if err != nil {
			t.Fatal(err)
		}
		disk.Cut()
		b, loaded, err := f.Load(t.Context())
		if err != nil || loaded != saved {
			t.Fatalf("after save %d and a power failure: generation %d, %v", n, generation(b), err)
		}
		if b, err := f.Previous(t.Context()); n > 1 && (err != nil || generation(b) != n-1) {
			t.Errorf("after save %d and a power failure the previous content is generation %d, %v", n, generation(b), err)
		}
		version = saved
	}
}

// TestPowerLossWithoutNews: Save flushes the folder even if it has nothing to write,
// because an earlier flush may have failed.
func TestPowerLossWithoutNews(t *testing.T) {
	dir := t.TempDir()
	disk := powerloss.New(t, dir)
	path := filepath.Join(dir, "keyring.json")
	f := store.NewFile(path)
	version := save(t, f, "one", "")
	// A save that failed to flush the folder leaves this file behind.
	file, err := os.OpenFile(path+".tmp", os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := file.WriteString("two"); err != nil {
		t.Fatal(err)
	}
	if err := file.Sync(); err != nil {
		t.Fatal(err)
	}
	file.Close()
	if err := os.Rename(path+".tmp", path); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Save(t.Context(), []byte("two"), version); err == nil {
		t.Fatal("a save from an older version succeeds")
	}
	save(t, f, "two", expect(t, f, "two"))
	disk.Cut()
	if b, _, err := f.Load(t.Context()); err != nil || !bytes.Equal(b, []byte("two")) {
		t.Errorf("after a power failure: %q, %v", b, err)
	}
}
