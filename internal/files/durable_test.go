package files

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/internal/powerloss"
	"github.com/beezy-dev/kleidi/seal"
)

// TestPowerLoss: a new file, a replaced one and a line of the audit log are there after
// a power failure, each on a disk of its own, because a flush of one flushes the others.
func TestPowerLoss(t *testing.T) {
	want := bytes.Repeat([]byte("kleidi\n"), 2000)
	for name, write := range map[string]func(path string) error{
		"new":     func(path string) error { return WriteNew(path, want) },
		"replace": func(path string) error { return Replace(path, want) },
		"log":     func(path string) error { return (&Log{Path: path}).Append(want) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			disk := powerloss.New(t, dir)
			path := filepath.Join(dir, "file")
			if err := write(path); err != nil {
				t.Fatal(err)
			}
			disk.Cut()
			if b, err := os.ReadFile(path); err != nil || !bytes.Equal(b, want) {
				t.Errorf("%d bytes of %d, %v", len(b), len(want), err)
			}
		})
	}
}

// TestFullDisk: no partly written file is left behind, a line that doesn't fit is removed
// whole, and the log works again once there is room.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	const size = 64 << 10
	if err := unix.Mount("kleidi", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0)
	if err := WriteNew(filepath.Join(dir, "new"), make([]byte, 2*size)); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("more than the disk holds: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "new")); !os.IsNotExist(err) {
		t.Errorf("half a file is left: %v", err)
	}
	path := filepath.Join(dir, "log")
	l := &Log{Path: path}
	if err := l.Append([]byte("first\n")); err != nil {
		t.Fatal(err)
	}
	if err := l.Failing(); err != nil {
		t.Errorf("a log that was never refused: %v", err)
	}
	if err := l.Append(make([]byte, 2*size)); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("lines larger than the disk: %v", err)
	}
	hog := filepath.Join(dir, "hog")
	if err := os.WriteFile(hog, make([]byte, 2*size), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 0); err != nil { // the next line needs a page
		t.Fatal(err)
	}
	if err := os.WriteFile(hog+"2", make([]byte, 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Failing(); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("there is no room yet: %v", err)
	}
	if err := os.Remove(hog); err != nil {
		t.Fatal(err)
	}
	if err := l.Failing(); err != nil {
		t.Errorf("there is room again: %v", err)
	}
	if err := errors.Join(l.Append([]byte("second\n")), AppendJSON(l, []int{3})); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "second\n3\n" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestWriteNewOver: a file that exists stays as it is.
func TestWriteNewOver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := WriteNew(path, []byte("old")); err != nil {
		t.Fatal(err)
	}
	if err := WriteNew(path, []byte("new")); !errors.Is(err, os.ErrExist) {
		t.Error(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "old" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestRead: a missing file is an error, and a file that is too long shows it.
func TestRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	for name, read := range map[string]func(string, int64) ([]byte, error){"Read": Read, "ReadOwned": ReadOwned} {
		if _, err := read(path+".missing", 3); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
		for content, want := range map[string]int{"": 0, "abc": 3, "abcd": 4, "abcde": 4} {
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			if b, err := read(path, 3); err != nil || len(b) != want {
				t.Errorf("%s of %q: %q, %v", name, content, b, err)
			}
		}
	}
}

// TestFolderNotFlushed: WriteNew flushes the new name too. In a folder that its user may
// write to but not open, that fails, and WriteNew removes the file.
func TestFolderNotFlushed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dir")
	if err := os.Mkdir(dir, 0o300); err != nil {
		t.Fatal(err)
	}
	defer os.Chmod(dir, 0o700)
	asUser(t, dir, func() {
		path := filepath.Join(dir, "file")
		if err := WriteNew(path, []byte("new")); !errors.Is(err, os.ErrPermission) {
			t.Errorf("the folder could not be flushed: %v", err)
		}
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("a file is left whose name may be lost: %v", err)
		}
		if err := (&Log{Path: path}).Append([]byte("line\n")); !errors.Is(err, os.ErrPermission) {
			t.Errorf("the folder of a log could not be flushed: %v", err)
		}
	})
}

// TestLogOfMany: lines that come at once are each whole, and asking for the log's health
// makes no file.
func TestLogOfMany(t *testing.T) {
	l := &Log{Path: filepath.Join(t.TempDir(), "log")}
	if err := l.Failing(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(l.Path); !os.IsNotExist(err) {
		t.Errorf("a question made the log: %v", err)
	}
	var all sync.WaitGroup
	const writers, lines = 4, 10
	for range writers {
		all.Go(func() {
			for range lines {
				if err := errors.Join(l.Append([]byte("line\n")), l.Failing()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if b, err := os.ReadFile(l.Path); err != nil || string(b) != strings.Repeat("line\n", writers*lines) {
		t.Errorf("%q, %v", b, err)
	}
}

// TestHintRoot: only an error about missing rights gets the hint, and only for a user other
// than root.
func TestHintRoot(t *testing.T) {
	hinted := func(err error) bool {
		_, hint := seal.SplitHint(HintRoot(err))
		return hint != ""
	}
	if os.Geteuid() == 0 && hinted(os.ErrPermission) {
		t.Error("root is told to be root")
	}
	asUser(t, t.TempDir(), func() {
		if !hinted(os.ErrPermission) {
			t.Error("missing rights get no hint")
		}
		if hinted(os.ErrNotExist) || HintRoot(nil) != nil {
			t.Error("something other than missing rights gets the hint")
		}
	})
}

// asUser runs f as a user other than root who owns dir.
func asUser(t *testing.T, dir string, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		f()
		return
	}
	const user = 4711
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if d == dir {
			if err := os.Chown(d, user, user); err != nil {
				t.Fatal(err)
			}
		} else if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with the goroutine
		_, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, user, user, user)
		if errno == 0 {
			f()
			done <- nil
			return
		}
		done <- errno
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
