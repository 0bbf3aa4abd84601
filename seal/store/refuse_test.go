package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/seal/store"
)

func TestFileMode(t *testing.T) {
	old := unix.Umask(0)
	defer unix.Umask(old)
	dir := stateDir(t)
	path := filepath.Join(dir, "keyring.json")
	save(t, store.NewFile(path), "one", "")
	for p, want := range map[string]fs.FileMode{dir: 0o700, path: 0o600} {
		if info, err := os.Stat(p); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", p, info.Mode(), err)
		}
	}
}

// TestFolders: neither a file nor a lock is safe in these folders.
func TestFolders(t *testing.T) {
	for _, test := range []struct {
		name, says string
		make       func(dir string) error
	}{
		{"missing", "no such file", func(string) error { return nil }},
		{"world-writable", "chmod go-w", func(d string) error { return mkdir(d, 0o777) }},
		{"sticky", "chmod go-w", func(d string) error { return mkdir(d, 0o777|fs.ModeSticky) }},
		{"group-writable", "chmod go-w", func(d string) error { return mkdir(d, 0o770) }},
		{"symbolic link", "symbolic link", func(d string) error { return os.Symlink(filepath.Dir(d), d) }},
		{"file", "not a folder", func(d string) error { return os.WriteFile(d, nil, 0o600) }},
		{"foreign", "chown", func(d string) error { return errors.Join(mkdir(d, 0o700), os.Chown(d, 12345, 12345)) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "state")
			if err := test.make(dir); err != nil {
				t.Fatal(err)
			}
			f := store.NewFile(filepath.Join(dir, "keyring.json"))
			_, _, loadErr := f.Load(t.Context())
			_, lockErr := store.LockDir(dir)
			errs := map[string]error{"Load": loadErr, "LockDir": lockErr}
			if test.name == "missing" {
				if err := store.PrepareDir(filepath.Join(dir, "below")); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("PrepareDir makes more than one folder: %v", err)
				}
			} else {
				errs["PrepareDir"] = store.PrepareDir(dir)
			}
			_, errs["Save"] = f.Save(t.Context(), []byte("x"), "")
			for operation, err := range errs {
				if err == nil || !strings.Contains(err.Error(), test.says) || !strings.Contains(err.Error(), dir) {
					t.Errorf("%s: %v", operation, err)
				}
			}
		})
	}
}

func mkdir(dir string, mode fs.FileMode) error {
	return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, mode))
}

func TestFiles(t *testing.T) {
	for _, test := range []struct {
		name, says string
		make       func(path string) error
	}{
		{"symbolic link", "symbolic link", func(p string) error {
			return errors.Join(os.WriteFile(p+".target", []byte("x"), 0o600), os.Symlink(p+".target", p))
		}},
		{"dangling link", "symbolic link", func(p string) error { return os.Symlink(p+".target", p) }},
		{"folder", "not a regular file", func(p string) error { return os.Mkdir(p, 0o700) }},
		{"FIFO", "not a regular file", func(p string) error { return unix.Mkfifo(p, 0o600) }},
		{"world-writable", "chmod go-w", func(p string) error {
			return errors.Join(os.WriteFile(p, []byte("x"), 0o600), os.Chmod(p, 0o666))
		}},
		{"foreign", "chown", func(p string) error {
			return errors.Join(os.WriteFile(p, []byte("x"), 0o600), os.Chown(p, 12345, 12345))
		}},
		{"oversize", "more than", func(p string) error { return os.WriteFile(p, make([]byte, store.MaxSize+1), 0o600) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := stateDir(t)
			path := filepath.Join(dir, "keyring.json")
			if err := test.make(path); err != nil {
				t.Fatal(err)
			}
			before, err := os.Lstat(path)
			if err != nil {
				t.Fatal(err)
			}
			f := store.NewFile(path)
			_, _, loadErr := f.Load(t.Context())
			_, saveErr := f.Save(t.Context(), []byte("y"), "")
			for operation, err := range map[string]error{"Load": loadErr, "Save": saveErr} {
				if err == nil || !strings.Contains(err.Error(), test.says) || !strings.Contains(err.Error(), path) {
					t.Errorf("%s: %v", operation, err)
				}
			}
			after, err := os.Lstat(path)
			if err != nil || !os.SameFile(before, after) || after.Size() != before.Size() {
				t.Errorf("the refused file changed: %v, %v", after, err)
			}
		})
	}
}

func TestSaveRefusesOversizeAndCancelled(t *testing.T) {
	f := store.NewFile(filepath.Join(stateDir(t), "keyring.json"))
	v := save(t, f, "one", "")
	if _, err := f.Save(t.Context(), make([]byte, store.MaxSize+1), v); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Save(ctx, []byte("two"), v); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	expect(t, f, "one")
}

// TestFullDisk fills a small file system of its own, which needs the right to mount.
func TestFullDisk(t *testing.T) {
	mount := t.TempDir()
	if err := unix.Mount("tmpfs", mount, "tmpfs", 0, "size=256k,mode=0700"); err != nil {
		t.Fatalf("mount a small tmpfs (run the tests as root): %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	f := store.NewFile(filepath.Join(mount, "keyring.json"))
	v := save(t, f, "two", save(t, f, "one", ""))
	filler := filepath.Join(mount, "filler")
	if err := os.WriteFile(filler, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the file system is not full: %v", err)
	}
	big := bytes.Repeat([]byte("x"), 100<<10)
	if _, err := f.Save(t.Context(), big, v); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "keyring.json") {
		t.Fatalf("save on a full disk: %v", err)
	}
	expect(t, f, "two")
	if b, err := f.Previous(t.Context()); err != nil || string(b) != "one" {
		t.Errorf("previous is %q, %v", b, err)
	}
	onlyFiles(t, mount, "filler", "keyring.json", "keyring.json.previous")
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Save(t.Context(), big, v); err != nil {
		t.Errorf("save once there is room: %v", err)
	}
}

// TestReadOnlyDisk: root may write everywhere except on a read-only disk.
func TestReadOnlyDisk(t *testing.T) {
	mount := t.TempDir()
	if err := unix.Mount("tmpfs", mount, "tmpfs", 0, "size=256k,mode=0700"); err != nil {
		t.Fatalf("mount a small tmpfs (run the tests as root): %v", err)
	}
	t.Cleanup(func() { unix.Unmount(mount, unix.MNT_DETACH) })
	f := store.NewFile(filepath.Join(mount, "keyring.json"))
	v := save(t, f, "one", "")
	if err := unix.Mount("", mount, "", unix.MS_REMOUNT|unix.MS_RDONLY, "size=256k,mode=0700"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Save(t.Context(), []byte("two"), v); !errors.Is(err, unix.EROFS) {
		t.Errorf("save: %v", err)
	}
	if _, err := store.LockDir(mount); !errors.Is(err, unix.EROFS) {
		t.Errorf("lock: %v", err)
	}
	if err := store.PrepareDir(filepath.Join(mount, "below")); !errors.Is(err, unix.EROFS) {
		t.Errorf("make a folder: %v", err)
	}
	expect(t, f, "one")
}

// TestFailedSaveLeavesEverything: a save that can't keep the previous content leaves
// all files as they were. A folder that is not empty has the name of the previous
// file here.
func TestFailedSaveLeavesEverything(t *testing.T) {
	dir := stateDir(t)
	f := store.NewFile(filepath.Join(dir, "keyring.json"))
	v := save(t, f, "one", "")
	if err := os.MkdirAll(filepath.Join(dir, "keyring.json.previous", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Save(t.Context(), []byte("two"), v); err == nil {
		t.Fatal("save succeeds without keeping the previous content")
	}
	expect(t, f, "one")
	onlyFiles(t, dir, "keyring.json", "keyring.json.previous")
}

// TestOneOfManyWins: of several changes made from one version, exactly one is saved.
func TestOneOfManyWins(t *testing.T) {
	f := store.NewFile(filepath.Join(stateDir(t), "keyring.json"))
	v := save(t, f, "start", "")
	var wg sync.WaitGroup
	var mu sync.Mutex
	var won []string
	for i := range 8 {
		wg.Go(func() {
			b := fmt.Sprintf("by %d", i)
			_, err := f.Save(context.Background(), []byte(b), v)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won = append(won, b)
			} else if !errors.Is(err, store.ErrConflict) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(won) != 1 {
		t.Fatalf("%v won", won)
	}
	expect(t, f, won[0])
}

func TestLock(t *testing.T) {
	dir := stateDir(t)
	// A process with a longer ID held the lock before.
	if err := os.WriteFile(filepath.Join(dir, "lock"), []byte("1234567890123\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := store.LockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	// A second open file conflicts with the first, even in one process.
	_, err = store.LockDir(dir)
	if !errors.Is(err, store.ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("by process %d;", os.Getpid())) {
		t.Errorf("second lock: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := store.LockDir(dir)
	if err != nil {
		t.Fatalf("after Close: %v", err)
	}
	again.Close()
	lock := filepath.Join(dir, "lock")
	if err := errors.Join(os.Remove(lock), os.Symlink(filepath.Join(dir, "elsewhere"), lock)); err != nil {
		t.Fatal(err)
	}
	if _, err := store.LockDir(dir); err == nil {
		t.Error("a lock that is a symbolic link is taken")
	}
	onlyFiles(t, dir, "lock")
}

func TestPrepareDirTwice(t *testing.T) {
	if err := store.PrepareDir(stateDir(t) + "/"); err != nil {
		t.Error(err)
	}
}
