package store_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/beezy-dev/kleidi/seal/store"
)

func stateDir(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	if err := store.PrepareDir(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

func save(t testing.TB, f *store.File, content string, old store.Version) store.Version {
	t.Helper()
	v, err := f.Save(context.Background(), []byte(content), old)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func expect(t testing.TB, f *store.File, content string) store.Version {
	t.Helper()
	b, v, err := f.Load(context.Background())
	if err != nil || string(b) != content {
		t.Fatalf("loaded %q, %v; want %q", b, err, content)
	}
	return v
}

func TestSaveLoad(t *testing.T) {
	f := store.NewFile(filepath.Join(stateDir(t), "keyring.json"))
	if _, v, err := f.Load(t.Context()); !errors.Is(err, fs.ErrNotExist) || v != "" {
		t.Fatalf("%q, %v", v, err)
	}
	v1 := save(t, f, "one", "")
	v2 := save(t, f, "two", v1)
	if got := expect(t, f, "two"); got != v2 {
		t.Errorf("version %q, want %q", got, v2)
	}
	if b, err := f.Previous(t.Context()); err != nil || string(b) != "one" {
		t.Errorf("previous is %q, %v", b, err)
	}
	for _, stale := range []store.Version{"", v1, "nonsense"} {
		if _, err := f.Save(t.Context(), []byte("three"), stale); !errors.Is(err, store.ErrConflict) {
			t.Errorf("save over version %q: %v", stale, err)
		}
	}
	expect(t, f, "two")
}

// TestDamageDoesNotReplaceThePrevious: content that the function given to Keep
// rejects does not replace the previous content.
func TestDamageDoesNotReplaceThePrevious(t *testing.T) {
	path := filepath.Join(stateDir(t), "f")
	f := store.NewFile(path).Keep(func(b []byte) bool { return string(b) != "damaged" })
	v := save(t, f, "one", "")
	save(t, f, "two", v)
	if err := os.WriteFile(path, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, v, err := f.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	v = save(t, f, "three", v)
	if b, err := f.Previous(t.Context()); err != nil || string(b) != "one" {
		t.Errorf("previous is %q, %v; want the content before the damage", b, err)
	}
	save(t, f, "four", v)
	if b, err := f.Previous(t.Context()); err != nil || string(b) != "three" {
		t.Errorf("previous is %q, %v", b, err)
	}
}

// TestFormerly: a file with the former name is renamed, and its previous file too. It
// never replaces a file that has the present name.
func TestFormerly(t *testing.T) {
	dir := stateDir(t)
	former := store.NewFile(filepath.Join(dir, "pin.json"))
	save(t, former, "two", save(t, former, "one", ""))
	f := store.NewFile(filepath.Join(dir, "anchor.json")).Formerly("pin.json")
	v := expect(t, f, "two")
	if b, err := f.Previous(t.Context()); err != nil || string(b) != "one" {
		t.Errorf("previous is %q, %v", b, err)
	}
	onlyFiles(t, dir, "anchor.json", "anchor.json.previous")
	save(t, f, "three", v)

	save(t, former, "planted", "")
	expect(t, f, "three")
	onlyFiles(t, dir, "anchor.json", "anchor.json.previous", "pin.json")
}

// TestFormerlyWithoutPrevious: the file with the former name need not have a previous
// file. If the present file is refused, the former one does not replace it.
func TestFormerlyWithoutPrevious(t *testing.T) {
	dir := stateDir(t)
	former := store.NewFile(filepath.Join(dir, "pin.json"))
	save(t, former, "one", "")
	f := store.NewFile(filepath.Join(dir, "anchor.json")).Formerly("pin.json")
	expect(t, f, "one")
	onlyFiles(t, dir, "anchor.json")

	save(t, former, "planted", "")
	if err := os.Chmod(f.Path(), 0o666); err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.Load(t.Context()); err == nil {
		t.Error("a file that others may write is loaded")
	}
	onlyFiles(t, dir, "anchor.json", "pin.json")
}

// TestSaveWithoutChange: to save the same content again keeps the previous content.
func TestSaveWithoutChange(t *testing.T) {
	f := store.NewFile(filepath.Join(stateDir(t), "f"))
	v := save(t, f, "two", save(t, f, "one", ""))
	if again := save(t, f, "two", v); again != v {
		t.Errorf("version %q, want %q", again, v)
	}
	if b, err := f.Previous(t.Context()); err != nil || string(b) != "one" {
		t.Errorf("previous is %q, %v", b, err)
	}
}
