package unixsocket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// folder makes a folder that other users can't write to.
func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "s") // a short path: a socket's has room for about 100 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func own() []uint32 { return []uint32{uint32(os.Geteuid())} }

func listenAt(t *testing.T, path string) *Listener {
	t.Helper()
	l, err := Listen(Config{Path: path, Setting: "kms.socket", Mode: 0o600, AllowedUIDs: own()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// TestCheckPath: which paths can be a socket, and why the others are refused.
func TestCheckPath(t *testing.T) {
	longest := "/" + strings.Repeat("a", MaxPath-1)
	for path, says := range map[string]string{
		"/run/kleidi/kms.sock":    "",
		longest:                   "",
		longest + "a":             "choose a shorter one",
		"@kleidi":                 "abstract socket",
		"/run/\x00kms.sock":       "abstract socket",
		"kms.sock":                "not a clean absolute path",
		"/run/../kms.sock":        "not a clean absolute path",
		"/run/kleidi/kms.sock/":   "not a clean absolute path",
		"/run//kleidi/kms.sock":   "not a clean absolute path",
		"unix:///run/kleidi/sock": "not a clean absolute path",
		"":                        "not a clean absolute path",
	} {
		if err := checkPath(path); says == "" && err != nil || says != "" && (err == nil || !strings.Contains(err.Error(), says)) {
			t.Errorf("%q: %v", path, err)
		}
	}
}

// TestOccupants: the only thing at the socket's path that may be replaced is a socket on
// which nothing answers.
func TestOccupants(t *testing.T) {
	bind := func(t *testing.T, path string) *net.UnixListener {
		t.Helper()
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		t.Cleanup(func() { l.Close() })
		return l
	}
	for name, row := range map[string]struct {
		put  func(t *testing.T, path string)
		says string
	}{
		"nothing":      {func(*testing.T, string) {}, ""},
		"stale socket": {func(t *testing.T, path string) { bind(t, path).Close() }, ""},
		"live socket":  {func(t *testing.T, path string) { bind(t, path) }, fmt.Sprintf("process %d (UID %d) listens there", os.Getpid(), os.Geteuid())},
		"file":         {func(t *testing.T, path string) { noError(t, os.WriteFile(path, nil, 0o600)) }, "is not a socket"},
		"folder":       {func(t *testing.T, path string) { noError(t, os.Mkdir(path, 0o700)) }, "is not a socket"},
		"FIFO":         {func(t *testing.T, path string) { noError(t, syscall.Mkfifo(path, 0o600)) }, "is not a socket"},
		"link": {func(t *testing.T, path string) {
			bind(t, path+"2").Close()
			noError(t, os.Symlink(path+"2", path))
		}, "is not a socket"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(folder(t), "s")
			row.put(t, path)
			l, err := Listen(Config{Path: path, Setting: "kms.socket", Mode: 0o600})
			if err == nil {
				l.Close()
			}
			if row.says == "" && err != nil || row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says) || !strings.HasPrefix(err.Error(), "kms.socket: ")) {
				t.Errorf("%v", err)
			}
		})
	}
}

func noError(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestPrivateFolderOfAKilledProcess: a private folder left by a killed process is used
// again. A folder that another user could have put there is refused.
func TestPrivateFolderOfAKilledProcess(t *testing.T) {
	for name, row := range map[string]struct {
		put  func(t *testing.T, dir string)
		says string
	}{
		"empty": {func(t *testing.T, dir string) { noError(t, os.Mkdir(dir, 0o700)) }, ""},
		"with its socket": {func(t *testing.T, dir string) {
			noError(t, os.Mkdir(dir, 0o700))
			noError(t, os.WriteFile(dir+"/s", nil, 0o600))
		}, ""},
		"open to others": {func(t *testing.T, dir string) { noError(t, os.Mkdir(dir, 0o700)); noError(t, os.Chmod(dir, 0o711)) }, "is not a folder that kleidi made"},
		"a link":         {func(t *testing.T, dir string) { noError(t, os.Symlink("/", dir)) }, "is not a folder that kleidi made"},
		"a file":         {func(t *testing.T, dir string) { noError(t, os.WriteFile(dir, nil, 0o700)) }, "is not a folder that kleidi made"},
		"with other things": {func(t *testing.T, dir string) {
			noError(t, os.MkdirAll(dir+"/s/x", 0o700))
			noError(t, os.Chmod(dir, 0o700))
		}, "directory not empty"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(folder(t), "sock")
			row.put(t, beside(path, ".new"))
			l, err := Listen(Config{Path: path, Mode: 0o600})
			if err == nil {
				l.Close()
			}
			if row.says == "" && err != nil || row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestLock: the second process is told who holds the path. The lock file stays, and its
// content is only for display.
func TestLock(t *testing.T) {
	path := filepath.Join(folder(t), "lock")
	first, err := takeLock(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := takeLock(path); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("(PID %d) holds", os.Getpid())) {
		t.Errorf("%v", err)
	}
	noError(t, first.Close())
	noError(t, os.WriteFile(path, []byte(strings.Repeat("9", 1000)), 0o600))
	second, err := takeLock(path)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if b, err := os.ReadFile(path); err != nil || string(b) != fmt.Sprintln(os.Getpid()) {
		t.Errorf("%q, %v", b, err)
	}
	link := path + "2"
	noError(t, os.Symlink(path, link))
	if _, err := takeLock(link); !errors.Is(err, syscall.ELOOP) {
		t.Errorf("a link is followed: %v", err)
	}
}

// TestCloseLeavesTheNextSocket: closing removes only the listener's own socket, and may
// be repeated.
func TestCloseLeavesTheNextSocket(t *testing.T) {
	path := filepath.Join(folder(t), "s")
	l := listenAt(t, path)
	if l.Addr().String() != path {
		t.Errorf("the address is %s", l.Addr())
	}
	noError(t, os.Remove(path))
	noError(t, os.WriteFile(path, nil, 0o600))
	for range 2 {
		noError(t, l.Close())
	}
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
	noError(t, os.Remove(path))
	again := listenAt(t, path)
	noError(t, again.Close())
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket stays: %v", err)
	}
}

// TestAccept: the connection says whose it is, and whether that user may use the socket.
func TestAccept(t *testing.T) {
	for name, row := range map[string]struct {
		allowed []uint32
		any     bool
		want    bool
	}{
		"allowed":  {own(), false, true},
		"stranger": {[]uint32{uint32(os.Geteuid()) + 1}, false, false},
		"anybody":  {nil, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(folder(t), "s")
			l, err := Listen(Config{Path: path, Mode: 0o600, AllowedUIDs: row.allowed, AnyPeer: row.any})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			client, err := Dial(t.Context(), path, "kleidi serve")
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if got := c.(*Conn); got.Allowed != row.want || got.Peer.PID != int32(os.Getpid()) || int(got.Peer.UID) != os.Geteuid() {
				t.Errorf("%+v", got)
			}
		})
	}
}

// TestSeats: allowed peers and strangers are counted separately, a closed connection
// makes room, and closing it twice makes room once.
func TestSeats(t *testing.T) {
	const owner, stranger = 7, 8
	for name, row := range map[string]struct {
		uid, other uint32
		limit      int
	}{
		"allowed":   {owner, stranger, MaxConns},
		"strangers": {stranger, owner, MaxStrangers},
	} {
		var s seats
		s.init([]uint32{owner}, false, nil)
		var last *Conn
		for i := range row.limit {
			if last = s.take(nil, Peer{UID: row.uid}); last == nil {
				t.Fatalf("%s: connection %d of %d is refused", name, i+1, row.limit)
			}
		}
		if s.take(nil, Peer{UID: row.uid}) != nil {
			t.Errorf("%s: more than %d connections", name, row.limit)
		}
		if s.take(nil, Peer{UID: row.other}) == nil {
			t.Errorf("%s crowd out the others", name)
		}
		last.leave()
		last.leave()
		if s.take(nil, Peer{UID: row.uid}) == nil {
			t.Errorf("%s: a closed connection makes no room", name)
		}
		if s.take(nil, Peer{UID: row.uid}) != nil {
			t.Errorf("%s: a connection that was closed twice makes room twice", name)
		}
	}
}

// TestDialRefusals: a client sends nothing to a socket in a folder that others may write
// to, and can tell that nobody listens.
func TestDialRefusals(t *testing.T) {
	dir := folder(t)
	path := filepath.Join(dir, "s")
	if _, err := Dial(t.Context(), path, "kleidi serve"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
	if _, err := Dial(t.Context(), filepath.Join(dir, "none", "s"), "kleidi serve"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
	l := listenAt(t, path)
	c, err := Dial(t.Context(), path, "kleidi serve")
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	noError(t, os.Chmod(dir, 0o777|fs.ModeSticky))
	if _, err := Dial(t.Context(), path, "kleidi serve"); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("a folder that all may write: %v", err)
	}
	noError(t, os.Chmod(dir, 0o700))
	noError(t, l.UnixListener.Close())
	if _, err := Dial(t.Context(), path, "kleidi serve"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("nobody listens: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Dial(ctx, path, "kleidi serve"); err == nil {
		t.Error("a cancelled call dials")
	}
}

// TestCheckFolderOfAFutureSocket: a folder that systemd has yet to make is not a
// configuration error; a folder that others may write to is.
func TestCheckFolderOfAFutureSocket(t *testing.T) {
	dir := folder(t)
	noError(t, CheckFolder(filepath.Join(dir, "later", "s"), "kms.socket"))
	noError(t, CheckFolder(filepath.Join(dir, "s"), "kms.socket"))
	noError(t, os.Chmod(dir, 0o777))
	if err := CheckFolder(filepath.Join(dir, "s"), "kms.socket"); err == nil || !strings.HasPrefix(err.Error(), "kms.socket: ") {
		t.Errorf("%v", err)
	}
}

// TestRefusalCanBeRead: a stranger's connection stays open, so that the server can say why
// it refuses.
func TestRefusalCanBeRead(t *testing.T) {
	path := filepath.Join(folder(t), "s")
	l, err := Listen(Config{Path: path, Mode: 0o666})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := Dial(t.Context(), path, "kleidi serve")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if c.(*Conn).Allowed {
		t.Error("nobody is allowed, and this one is")
	}
	if _, err := io.WriteString(c, "no"); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if b, err := io.ReadAll(client); string(b) != "no" {
		t.Errorf("%q, %v", b, err)
	}
}
