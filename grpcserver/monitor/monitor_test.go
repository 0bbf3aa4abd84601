package monitor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// rig is a server on a socket.
type rig struct {
	*testing.T
	*Server
	path string
}

func start(t *testing.T, h http.Handler, change ...func(*http.Server)) *rig {
	t.Helper()
	r := &rig{t, New(h), filepath.Join(t.TempDir(), "http.sock")}
	for _, f := range change {
		f(r.http)
	}
	l, err := ListenSocket(SocketConfig{Path: r.path, GID: -1})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- r.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if err := errors.Join(r.Shutdown(ctx), <-done); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *rig) dial() net.Conn {
	r.Helper()
	c, err := net.Dial("unix", r.path)
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { c.Close() })
	return c
}

const request = "GET /livez HTTP/1.1\r\nHost: kleidi\r\n\r\n"

func (r *rig) get() error {
	c, err := net.Dial("unix", r.path)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, request); err != nil {
		return err
	}
	b, err := io.ReadAll(c)
	if err == nil && !strings.HasPrefix(string(b), "HTTP/1.1 200 ") {
		err = fmt.Errorf("answer %q", b)
	}
	return err
}

var ok = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })

// ends demands that the server ends a connection.
func ends(t *testing.T, c net.Conn) string {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(2 * time.Minute))
	b, err := io.ReadAll(c)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("the connection is still open")
	}
	return string(b)
}

// TestOneRequestPerConnection: no connection is kept for another request.
func TestOneRequestPerConnection(t *testing.T) {
	r := start(t, ok)
	c := r.dial()
	if _, err := io.WriteString(c, request+request); err != nil {
		t.Fatal(err)
	}
	if got := ends(t, c); strings.Count(got, "HTTP/1.1 200") != 1 || !strings.Contains(got, "Connection: close") {
		t.Errorf("%q", got)
	}
}

// TestTimeouts tests each timeout alone, with the other two out of reach.
func TestTimeouts(t *testing.T) {
	// A test sends its request within the short time.
	const short, long = 2 * time.Second, time.Hour
	set := func(header, read, write time.Duration) func(*http.Server) {
		return func(s *http.Server) { s.ReadHeaderTimeout, s.ReadTimeout, s.WriteTimeout = header, read, write }
	}
	t.Run("header", func(t *testing.T) {
		r := start(t, ok, set(short, long, long))
		for _, sent := range []string{"", "GET /livez HTTP/1.1\r\nHost: kl"} {
			c := r.dial()
			_, _ = io.WriteString(c, sent)
			if got := ends(t, c); strings.Contains(got, "200 OK") {
				t.Errorf("%q: %q", sent, got)
			}
		}
	})
	t.Run("read", func(t *testing.T) {
		read := make(chan error, 1)
		r := start(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			_, err := io.ReadAll(r.Body)
			read <- err
		}), set(long, short, long))
		c := r.dial()
		_, _ = io.WriteString(c, "GET /livez HTTP/1.1\r\nHost: kleidi\r\nContent-Length: 9\r\n\r\nx")
		if err := <-read; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the body: %v", err)
		}
		ends(t, c)
	})
	t.Run("write", func(t *testing.T) {
		wrote := make(chan error, 1)
		r := start(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			for b := make([]byte, 64<<10); ; {
				if _, err := w.Write(b); err != nil {
					wrote <- err
					return
				}
			}
		}), set(long, long, short))
		c := r.dial()
		_, _ = io.WriteString(c, request)
		if err := <-wrote; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the answer that nobody reads: %v", err)
		}
		ends(t, c)
	})
}

// TestTimeoutsAreSet: New sets every timeout.
func TestTimeoutsAreSet(t *testing.T) {
	s := New(ok).http
	for what, d := range map[string]time.Duration{"header": s.ReadHeaderTimeout, "read": s.ReadTimeout, "write": s.WriteTimeout} {
		if d <= 0 || d > 5*time.Second {
			t.Errorf("the %s timeout is %v", what, d)
		}
	}
	if s.MaxHeaderBytes > 16<<10 {
		t.Errorf("headers of %d bytes", s.MaxHeaderBytes)
	}
}

// TestCrowd: with any number of connections, the server holds MaxConns, and serves the
// latest one.
func TestCrowd(t *testing.T) {
	before := openFiles(t)
	r := start(t, ok, func(s *http.Server) { s.ReadHeaderTimeout = time.Hour })
	var held []net.Conn
	for range 10 * MaxConns {
		held = append(held, r.dial())
	}
	if err := r.get(); err != nil {
		t.Errorf("beside silent connections: %v", err)
	}
	// The server has accepted the last one, and has closed one for each beyond the limit.
	for _, c := range held[:len(held)-MaxConns+1] {
		ends(t, c)
	}
	if n := openFiles(t) - before - len(held); n > MaxConns+8 {
		t.Errorf("%d file descriptors more than before", n)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestSocketsMode: the mode limits who may connect.
func TestSocketsMode(t *testing.T) {
	group := os.Getgid() // others may only give a socket to a group of their own
	if os.Getuid() == 0 {
		group = 1000
	}
	for mode, want := range map[os.FileMode]os.FileMode{0: 0o600, 0o660: 0o660} {
		path := filepath.Join(t.TempDir(), "http.sock")
		l, err := ListenSocket(SocketConfig{Path: path, Mode: mode, GID: group})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != want {
			t.Errorf("%v: %v, %v", mode, fi.Mode(), err)
		}
	}
	if _, err := ListenSocket(SocketConfig{Path: "@kleidi", GID: -1}); err == nil || !strings.Contains(err.Error(), "http.socket: ") {
		t.Errorf("an abstract socket: %v", err)
	}
}

// TestLoopback: the TCP listener serves the same.
func TestLoopback(t *testing.T) {
	l, err := ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := New(ok)
	done := make(chan error)
	go func() { done <- s.Serve(l) }()
	resp, err := http.Get("http://" + l.Addr().String() + "/livez")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK || !resp.Close {
		t.Errorf("%v, kept: %v", resp.Status, !resp.Close)
	}
	if err := errors.Join(s.Shutdown(t.Context()), <-done); err != nil {
		t.Error(err)
	}
	if _, err := ListenTCP("127.0.0.1:x"); err == nil {
		t.Error("listens nowhere")
	}
}

// TestCheckFiles: a limit below what the sockets admit is reported, with a remedy.
func TestCheckFiles(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Error(err)
		}
	}()
	const others = 5
	for n, want := range map[uint64]bool{files + others - 1: false, files + others: true} {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: limit.Max}); err != nil {
			t.Fatal(err)
		}
		if err := CheckFiles(others); (err == nil) != want || err != nil && !strings.Contains(err.Error(), "raise LimitNOFILE=") {
			t.Errorf("%d files: %v", n, err)
		}
	}
}
