package serve

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/grpcserver/kmsplugin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/foundingtest"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store"
)

// settings returns a machine's configuration with a keyring that the plugin opens, and with
// every socket in a folder of its own.
func settings(t *testing.T, p *nodetest.Plugin) *config.Config {
	t.Helper()
	n := nodetest.New(t, p.Opens)
	foundingtest.Found(t, n)
	n.Close()
	dir := t.TempDir()
	c := *n.Config
	c.KMS.Socket, c.Admin.Socket, c.HTTP.Socket, c.HTTP.SocketGID = filepath.Join(dir, "kms.sock"), filepath.Join(dir, "admin.sock"), filepath.Join(dir, "http.sock"), -1
	return &c
}

// get asks the HTTP socket.
func get(t *testing.T, socket, path string) (int, string) {
	t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	r, err := c.Get("http://kleidi" + path)
	if err != nil {
		return 0, err.Error()
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

// TestRun: a running serve answers kube-apiserver, commands and monitoring. It reads a
// keyring that another process has replaced. When it ends, its sockets are gone and the
// state folder is free.
func TestRun(t *testing.T) {
	c := settings(t, nodetest.NewPlugin(t))
	s, err := New(c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); s.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	if err := waitUntil(t, func() error {
		if code, body := get(t, c.HTTP.Socket, "/readyz"); code != http.StatusOK {
			return errors.New(body)
		}
		return nil
	}); err != nil {
		t.Fatalf("not ready: %v", err)
	}
	if _, body := get(t, c.HTTP.Socket, "/metrics"); !strings.Contains(body, "\nkleidi_open 1\n") {
		t.Errorf("the metrics: %.200s", body)
	}

	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	w, err := kmsplugin.New(kmsplugin.Config{Socket: c.KMS.Socket, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	slot, err := w.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatalf("the KMS socket encrypts: %v", err)
	}
	opened, err := w.Unwrap(t.Context(), slot)
	if err != nil || !opened.Equal(kek) {
		t.Fatalf("the KMS socket decrypts: %v", err)
	}
	opened.Close()

	status := func() admin.StatusReport {
		t.Helper()
		client, err := admin.Dial(t.Context(), c.Admin.Socket)
		if err != nil {
			t.Fatal(err)
		}
		r, err := admin.Call(t.Context(), client, admin.Status, admin.StatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	before := status()
	if before.State != admin.Open {
		t.Errorf("%+v", before)
	}
	k, err := s.Node.Unlocker.Keyring()
	if err != nil {
		t.Fatal(err)
	}
	next, err := k.AtLeast(k.Revision() + 1)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	file := store.NewFile(c.Keyring())
	_, version, err := file.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := file.Save(t.Context(), next.Marshal(), version); err != nil {
		t.Fatal(err)
	}
	if err := waitUntil(t, func() error {
		if now := status(); now.Revision != next.Revision() {
			return errors.New("the keyring was not read again")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}

	cancel()
	<-ended
	for _, socket := range []string{c.KMS.Socket, c.Admin.Socket, c.HTTP.Socket} {
		if _, err := os.Lstat(socket); err == nil {
			t.Errorf("%s stays", socket)
		}
	}
	if err := nodetest.Again(t, s.Node).AcquireState(); err != nil {
		t.Errorf("the state folder is not free: %v", err)
	}
}

// TestLocked: a serve without a plugin to open it listens all the same, and says that it is
// locked. It opens as soon as the plugin is back.
func TestLocked(t *testing.T) {
	p := nodetest.NewPlugin(t)
	c := settings(t, p)
	p.Stop()
	s, err := New(c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); s.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	<-s.Node.Unlocker.Tried()
	answer := func(want int, part string) error {
		return waitUntil(t, func() error {
			code, body := get(t, c.HTTP.Socket, "/readyz")
			if code != want || !strings.Contains(body, part) {
				return errors.New(body)
			}
			return nil
		})
	}
	if err := answer(http.StatusServiceUnavailable, "locked: "+string(seal.CauseUnavailable)); err != nil {
		t.Errorf("without the plugin: %v", err)
	}
	p.Start()
	s.Node.Unlocker.Nudge()
	if err := answer(http.StatusOK, ""); err != nil {
		t.Errorf("with the plugin: %v", err)
	}
}

// TestKMSSocketInUse: while another process has the KMS socket, serve is not ready, and
// says why.
func TestKMSSocketInUse(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "kms.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s, err := New(nodetest.New(t, func(c *config.Config) { c.KMS.Socket = socket }).Config, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Node.Close()
	if err := s.serveKMS(); err == nil {
		t.Fatal("it listens on the socket of another process")
	}
	if err := s.health.ready(); err == nil || !strings.HasPrefix(err.Error(), "KMS socket: ") || !strings.Contains(err.Error(), socket) {
		t.Errorf("%v", err)
	}
}

// TestTestSecondary: a self-test opens each slot of a backend, and its faults come into the
// log and into the remarks. The time of the last test stays while kleidi is locked.
func TestTestSecondary(t *testing.T) {
	p := nodetest.NewPlugin(t)
	c, log := settings(t, p), &nodetest.Log{}
	s := &Server{Node: nodetest.New(t, func(other *config.Config) { *other = *c })}
	s.Node.Log = slog.New(log)
	s.testSecondary(t.Context())
	if s.Node.SelfTests.Seconds() != 0 {
		t.Error("a locked node has tested its slots")
	}
	if err := s.Node.Unlocker.Unlock(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.testSecondary(t.Context())
	slot := s.Node.OpenSlots()[slices.IndexFunc(s.Node.OpenSlots(), func(s seal.Slot) bool { return s.Type == seal.TypeKMSPlugin })]
	if r := s.Node.SelfTests.Of(slot); r == nil || !r.Opens || s.Node.SelfTests.Seconds() == 0 || log.Count("a slot does not open") != 0 {
		t.Errorf("%+v, %q", r, log.Lines())
	}
	p.Replace()
	s.testSecondary(t.Context())
	if r := s.Node.SelfTests.Of(slot); r == nil || r.Opens || log.Count("self-test: a slot does not open slot=kms-plugin cause=") != 1 {
		t.Errorf("%+v, %q", r, log.Lines())
	}
}

// TestSelfTestNotWanted: without a backend there is nothing to test, and unlock.selfTest: 0
// tests nothing.
func TestSelfTestNotWanted(t *testing.T) {
	for name, n := range map[string]*node.Node{
		"no backend":   nodetest.New(t),
		"switched off": nodetest.New(t, nodetest.NewPlugin(t).Opens, func(c *config.Config) { c.Unlock.SelfTest = 0 }),
	} {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			(&Server{Node: n}).selfTest(t.Context())
			if time.Since(start) != 0 {
				t.Errorf("%s: it waited %v", name, time.Since(start))
			}
		})
	}
}

// TestAwaitOpen: a test that is due while kleidi is locked waits, says so once, and ends
// with serve.
func TestAwaitOpen(t *testing.T) {
	log := &nodetest.Log{}
	n := nodetest.New(t, nodetest.Opens(seal.TypePKCS11))
	n.Log = slog.New(log)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		start := time.Now()
		if (&Server{Node: n}).awaitOpen(ctx, time.Minute) || time.Since(start) != time.Hour {
			t.Errorf("after %v", time.Since(start))
		}
	})
	if log.Count("waiting until the keyring is open") != 1 {
		t.Errorf("%q", log.Lines())
	}
	nodetest.Hold(t, n, nodetest.Keyring(t, seal.Slot{Type: seal.TypeRecovery, Data: []byte("{}")}))
	if !(&Server{Node: n}).awaitOpen(t.Context(), time.Minute) {
		t.Error("an open keyring is waited for")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if (&Server{Node: n}).awaitOpen(ctx, time.Minute) {
		t.Error("a serve that ends begins a test")
	}
}

// TestHoldBack: a supervised serve that can't be set up waits before it ends, so that
// systemd does not start it every second. It ends at once when it is told to.
func TestHoldBack(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if Supervised() {
		t.Error("supervised by nobody")
	}
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		if HoldBack(t.Context(), errors.New("refused")); time.Since(start) != holdBack {
			t.Errorf("it waited %v", time.Since(start))
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		start = time.Now()
		if HoldBack(ctx, errors.New("refused")); time.Since(start) != 0 {
			t.Errorf("it waited %v after its end", time.Since(start))
		}
	})
}
