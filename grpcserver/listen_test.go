package grpcserver_test

import (
	"bufio"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/grpcserver"
)

// listen calls Listen in the test's own folder. The listener is closed with t.
func listen(t *testing.T, cfg grpcserver.ListenConfig) net.Listener {
	t.Helper()
	l, err := grpcserver.Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func refuse(t *testing.T, path string, texts ...string) {
	t.Helper()
	l, err := grpcserver.Listen(grpcserver.ListenConfig{Path: path})
	if err == nil {
		l.Close()
		t.Fatalf("listens on %q", path)
	}
	if l != nil {
		t.Errorf("%v, and a listener", err)
	}
	for _, text := range append(texts, "kms.socket: ") {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("error lacks %q: %v", text, err)
		}
	}
}

func TestSocketModeAndOwner(t *testing.T) {
	for _, tc := range []struct {
		mode  fs.FileMode
		owner *grpcserver.Owner
		want  fs.FileMode
		uid   uint32
	}{
		{0, nil, 0o600, 0},
		{0o660, &grpcserver.Owner{UID: -1, GID: 1000}, 0o660, 0},
		{0o600, &grpcserver.Owner{UID: 1000, GID: 1000}, 0o600, 1000},
	} {
		dir := openDir(t)
		path := filepath.Join(dir, "kms.sock")
		l := listen(t, grpcserver.ListenConfig{Path: path, Mode: tc.mode, Owner: tc.owner})
		fi, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		if st := fi.Sys().(*syscall.Stat_t); fi.Mode() != fs.ModeSocket|tc.want || st.Uid != tc.uid || tc.owner != nil && int(st.Gid) != tc.owner.GID {
			t.Errorf("%v: %v of UID %d, GID %d", tc, fi.Mode(), st.Uid, st.Gid)
		}
		if l.Addr().String() != path {
			t.Errorf("address %s", l.Addr())
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if left := names(t, dir); left != ".kms.sock.lock" {
			t.Errorf("left behind: %s", left)
		}
	}
}

// TestSocketIgnoresUmask: the mode is exact, and the umask stays what it was.
func TestSocketIgnoresUmask(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	path := filepath.Join(openDir(t), "kms.sock")
	listen(t, grpcserver.ListenConfig{Path: path, Mode: 0o666})
	if fi, err := os.Lstat(path); err != nil || fi.Mode().Perm() != 0o666 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	if now := syscall.Umask(0o077); now != 0o077 {
		t.Errorf("umask is %o", now)
	}
}

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

func TestBadPaths(t *testing.T) {
	dir := openDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(dir, "folder")
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	refuse(t, "@kleidi", "abstract socket")
	refuse(t, "\x00kleidi", "abstract socket")
	refuse(t, "kms.sock", "clean absolute path", "/run/kleidi/kms.sock")
	refuse(t, dir+"/../kms.sock", "clean absolute path")
	refuse(t, "", "clean absolute path")
	long := filepath.Join(dir, strings.Repeat("x", grpcserver.MaxSocketPath-len(dir)))
	refuse(t, long, "has "+strconv.Itoa(grpcserver.MaxSocketPath+1)+" bytes", "room for")
	refuse(t, file, "is not a socket", "move it away")
	refuse(t, link, "is not a socket")
	refuse(t, folder, "is not a socket")
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file is %q, %v", b, err)
	}
	listen(t, grpcserver.ListenConfig{Path: long[:len(long)-1]}) // the longest that fits
}

func TestBadFolders(t *testing.T) {
	base := openDir(t)
	mk := func(name string, mode os.FileMode, uid int) string {
		dir := filepath.Join(base, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(dir, uid, 0); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	good := mk("good", 0o755, 0)
	if err := os.Symlink(good, filepath.Join(base, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(base, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	below := filepath.Join(mk("loose", 0o777, 0), "sub")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	mk("everybody", 0o757, 0)
	mk("group", 0o775, 0)
	mk("foreign", 0o755, 1000)
	mk("sticky", os.ModeSticky|0o777, 0)
	mk("theirs", 0o755, 1000)
	mk("theirs/sub", 0o755, 0)
	for dir, texts := range map[string][]string{
		"missing":    {"does not exist", "install -d"},
		"link":       {"symbolic link"},
		"file":       {"is not a folder"},
		"everybody":  {"mode 0757", "chmod go-w"},
		"group":      {"mode 0775", "chmod go-w"},
		"foreign":    {"belongs to UID 1000", "chown"},
		"loose/sub":  {"/loose has mode 0777", "chmod go-w"},
		"sticky":     {"mode 1777", "may be first", "a folder of its own"},
		"theirs/sub": {"/theirs belongs to UID 1000", "chown"},
	} {
		t.Run(dir, func(t *testing.T) { refuse(t, filepath.Join(base, dir, "kms.sock"), texts...) })
	}
	t.Run("unwritable", func(t *testing.T) {
		refuse(t, "/proc/sys/kms.sock", "can't be written by UID 0")
		asUser(t, 1000, filepath.Join(good, "kms.sock"), "can't be written by UID 1000")
	})
	listen(t, grpcserver.ListenConfig{Path: filepath.Join(good, "kms.sock")})
}

// asUser lets another user listen on path, and wants an error.
func asUser(t *testing.T, uid uint32, path, text string) {
	t.Helper()
	out, _ := reexec(t, uid, asListener+"="+path).Output()
	if !strings.Contains(string(out), text) {
		t.Errorf("output lacks %q: %s", text, out)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	dir := openDir(t)
	path := filepath.Join(dir, "kms.sock")
	proc, lines, _ := listenElsewhere(t, path)
	if err := proc.Process.Kill(); err != nil { // leaves its socket behind, as a power loss does
		t.Fatal(err)
	}
	_ = proc.Wait()
	for range lines {
	}
	if _, err := os.Lstat(path); err != nil {
		t.Fatalf("no stale socket to test with: %v", err)
	}
	// A process that was killed between bind and rename leaves this folder.
	if err := os.Mkdir(filepath.Join(dir, ".kms.sock.new"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, ".kms.sock.new", "s"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l := listen(t, grpcserver.ListenConfig{Path: path})
	go func() {
		if c, err := l.Accept(); err == nil {
			c.Close()
		}
	}()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// listenElsewhere lets another process listen; it is ready when it returns.
func listenElsewhere(t *testing.T, path string) (*exec.Cmd, <-chan string, func()) {
	t.Helper()
	cmd := reexec(t, 0, asListener+"="+path)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 8)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			lines <- s.Text()
		}
	}()
	if first := <-lines; first != "listening" {
		t.Fatalf("the other process says %q", first)
	}
	return cmd, lines, func() { in.Close(); _ = cmd.Wait() }
}

func TestLiveSocketIsLeftAlone(t *testing.T) {
	path := filepath.Join(openDir(t), "kms.sock")
	proc, _, end := listenElsewhere(t, path)
	defer end()
	pid := strconv.Itoa(proc.Process.Pid)
	refuse(t, path, "PID "+pid, "stop it first")
	// The same without the lock: another program may listen there.
	if err := os.Remove(filepath.Join(filepath.Dir(path), ".kms.sock.lock")); err != nil {
		t.Fatal(err)
	}
	refuse(t, path, "answers already", "process "+pid+" (UID 0)")
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the live socket is gone: %v", err)
	}
	c.Close()
}

func TestOtherKindsOfSocketAreLeftAlone(t *testing.T) {
	path := filepath.Join(openDir(t), "kms.sock")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	refuse(t, path, "can't be told")
}

func TestCloseRemovesOnlyItsOwn(t *testing.T) {
	path := filepath.Join(openDir(t), "kms.sock")
	l := listen(t, grpcserver.ListenConfig{Path: path})
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	other, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for range 2 {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("somebody else's socket is removed: %v", err)
	}
}

// TestOneOfManyGetsTheSocket starts many at once: one wins, and keeps it.
func TestOneOfManyGetsTheSocket(t *testing.T) {
	path := filepath.Join(openDir(t), "kms.sock")
	for range 20 {
		var wg sync.WaitGroup
		won := make(chan net.Listener, 8)
		for range cap(won) {
			wg.Go(func() {
				if l, err := grpcserver.Listen(grpcserver.ListenConfig{Path: path}); err == nil {
					won <- l
				}
			})
		}
		wg.Wait()
		close(won)
		if len(won) != 1 {
			t.Fatalf("%d listen on one path", len(won))
		}
		l := <-won
		if c, err := net.Dial("unix", path); err != nil {
			t.Errorf("the winner is not reachable: %v", err)
		} else {
			c.Close()
		}
		l.Close()
	}
}

func TestPeers(t *testing.T) {
	root := []uint32{0}
	for _, tc := range []struct {
		name    string
		allowed []uint32
		owner   *grpcserver.Owner
		uid     uint32
		want    string
	}{
		{"default, root", nil, nil, 0, "OK: "},
		{"default, another", nil, nil, 1000, "PermissionDenied: UID 1000 may not use this socket; if kube-apiserver runs as that user, add 1000 to kms.allowedUIDs"},
		{"default, owner", nil, &grpcserver.Owner{UID: 1000}, 1000, "OK: "},
		{"default, root of another's", nil, &grpcserver.Owner{UID: 1000}, 0, "OK: "},
		{"default, group given away", nil, &grpcserver.Owner{UID: -1, GID: 1000}, 0, "OK: "},
		{"default, nobody's UID", nil, &grpcserver.Owner{UID: -1, GID: 1000}, 1<<32 - 2, "PermissionDenied: UID 4294967294"},
		{"listed", []uint32{0, 1000}, nil, 1000, "OK: "},
		{"root not listed", []uint32{1000}, nil, 0, "PermissionDenied: UID 0 may not use"},
		{"nobody listed", []uint32{}, nil, 0, "PermissionDenied: UID 0 may not use"},
		{"owner not listed", root, &grpcserver.Owner{UID: 1000}, 1000, "PermissionDenied: UID 1000"},
		{"overflow UID", root, nil, 65534, "PermissionDenied: UID 65534 may not use this socket: it is the overflow UID"},
		{"overflow UID owns", nil, &grpcserver.Owner{UID: 65534}, 65534, "PermissionDenied: UID 65534"},
		{"overflow UID listed", []uint32{0, 65534}, nil, 65534, "OK: "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := start(t, newKeys(t, "k1-a"), grpcserver.ListenConfig{Mode: 0o666, AllowedUIDs: tc.allowed, Owner: tc.owner})
			out, err := reexec(t, tc.uid, asClient+"="+r.path).Output()
			if err != nil || !strings.HasPrefix(string(out), tc.want) {
				t.Errorf("got %s (%v)\nwant %s", out, err, tc.want)
			}
			if denied := `code="PermissionDenied",method="Status"} 1`; strings.HasPrefix(tc.want, "Perm") && !strings.Contains(exposition(t, r.reg), denied) {
				t.Error("the refusal is not counted")
			}
		})
	}
}

// TestUnknownListenerIsRefused: without SO_PEERCRED nobody is let in.
func TestUnknownListenerIsRefused(t *testing.T) {
	path := filepath.Join(openDir(t), "kms.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv, err := grpcserver.New(newKeys(t, "k1-a"), grpcserver.Options{})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	c, err := dial(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Status(limited(t), &kmsapi.StatusRequest{})
	wantError(t, err, codes.Unavailable)
	srv.GracefulStop(limited(t))
	if err := <-done; err != nil {
		t.Error(err)
	}
}
