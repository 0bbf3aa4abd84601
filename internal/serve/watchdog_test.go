package serve

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
)

// systemd receives what a service tells systemd.
func systemd(t *testing.T) *net.UnixConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return c
}

// next returns the next message that begins with a word.
func next(t *testing.T, c *net.UnixConn, word string) error {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	for b := make([]byte, 4096); ; {
		n, err := c.Read(b)
		if err != nil || strings.HasPrefix(string(b[:n]), word) {
			return err
		}
	}
}

// TestWatchdogOfALockedServe: a serve without a keyring is locked, answers, and so is not
// restarted. If kms.allowedUIDs does not admit its own user, no alert takes it for a stranger.
func TestWatchdogOfALockedServe(t *testing.T) {
	for name, admitted := range map[string][]uint32{"admitted": {uint32(os.Geteuid())}, "not admitted": {4242}} {
		t.Run(name, func(t *testing.T) {
			c, dir := systemd(t), t.TempDir()
			t.Setenv("WATCHDOG_USEC", strconv.FormatInt((4*time.Second).Microseconds(), 10))
			t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
			s, err := New(nodetest.New(t, func(c *config.Config) {
				c.KMS.AllowedUIDs = admitted
				c.KMS.Socket, c.Admin.Socket, c.HTTP.Socket = filepath.Join(dir, "kms.sock"), filepath.Join(dir, "admin.sock"), ""
			}).Config, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			go func() { defer close(ended); s.Run(ctx) }()
			defer func() { cancel(); <-ended }()
			if err := next(t, c, "WATCHDOG=1"); err != nil {
				t.Fatal(err)
			}
			got, err := s.health.registry.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, family := range got {
				for _, m := range family.GetMetric() {
					if strings.Contains(m.String(), `"PermissionDenied"`) && m.GetCounter().GetValue() > 0 {
						t.Errorf("%s: %s", family.GetName(), m)
					}
				}
			}
			if s.Node.Unlocker.State().Open {
				t.Fatal("it is open, without a keyring")
			}
		})
	}
}

// TestWatchdogOfAHungServe: no ping follows a socket that accepts and never answers, nor one
// where nobody listens.
func TestWatchdogOfAHungServe(t *testing.T) {
	c := systemd(t)
	socket := filepath.Join(t.TempDir(), "kms.sock")
	s := &Server{Node: nodetest.New(t, func(c *config.Config) { c.KMS.Socket = socket })}
	s.feedOnce(t.Context(), time.Minute) // nobody listens
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, hung := context.WithCancel(t.Context())
	go func() {
		conn, err := l.Accept()
		if err == nil {
			_, _ = io.ReadFull(conn, make([]byte, 24)) // the preface of HTTP/2
		}
		hung()
	}()
	s.feedOnce(ctx, time.Hour)
	if _, err := daemon.SdNotify(false, "STATUS=the end"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	if n, err := c.Read(b); err != nil || string(b[:n]) != "STATUS=the end" {
		t.Errorf("systemd was told %q: %v", b[:n], err)
	}
}
