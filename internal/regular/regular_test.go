package regular

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRefused: whatever is not a file is refused at once, with its name and its kind, also
// at the end of a symbolic link.
func TestRefused(t *testing.T) {
	dir := t.TempDir()
	pipe, socket := filepath.Join(dir, "pipe"), filepath.Join(dir, "socket")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for path, kind := range map[string]string{pipe: "a named pipe", socket: "a socket", dir: "a folder", "/dev/null": "a device"} {
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Symlink(path, link); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{path, link} {
			for _, open := range []func(string) (*os.File, error){Open, OpenArgument} {
				_, err := open(name)
				if want := fmt.Sprintf("open %s: it is %s, not a file", name, kind); err == nil || err.Error() != want {
					t.Errorf("%v, want %s", err, want)
				}
			}
		}
	}
}

// TestCheck: one path that is no file is enough, and a library may say itself what is missing.
func TestCheck(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing")
	if err := Check("", missing, "/proc/self/status"); err != nil {
		t.Error(err)
	}
	if err := Check("", missing, "/proc/self/status", "/dev/null"); err == nil || err.Error() != "open /dev/null: it is a device, not a file" {
		t.Error(err)
	}
}

// TestOpen: a file opens under its name and under a link's.
func TestOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("file", path+".link"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{path, path + ".link"} {
		for _, open := range []func(string) (*os.File, error){Open, OpenArgument} {
			f, err := open(name)
			if err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(f); err != nil || string(b) != "content" {
				t.Errorf("%s: %q, %v", name, b, err)
			}
			f.Close()
		}
	}
	for _, open := range []func(string) (*os.File, error){Open, OpenArgument} {
		if _, err := open(path + ".missing"); !os.IsNotExist(err) || !strings.HasPrefix(err.Error(), "open ") {
			t.Error(err)
		}
	}
}

// TestShellsPipe: <(command) gives a pipe without a name. It is read to its end, though its
// writer is slow. A file that must stay as it is can't be a pipe.
func TestShellsPipe(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	path := fmt.Sprintf("/dev/fd/%d", r.Fd())
	if _, err := Open(path); err == nil {
		t.Error("Open took a pipe")
	}
	f, err := OpenArgument(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	read := make(chan string)
	go func() {
		b, err := io.ReadAll(f)
		read <- fmt.Sprint(string(b), err)
	}()
	for _, part := range []string{"one ", "two "} {
		if _, err := w.WriteString(part); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	if got := <-read; got != "one two <nil>" {
		t.Errorf("%q", got)
	}
}
