package grpcserver_test

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/grpcserver"
	"github.com/beezy-dev/kleidi/seal"
)

// asClient makes the test binary call Status on the named socket and print the answer.
const asClient = "KLEIDI_TEST_CLIENT"

// asListener makes the test binary listen on the named socket, say so, and wait for its
// standard input to close.
const asListener = "KLEIDI_TEST_LISTENER"

func TestMain(m *testing.M) {
	if path := os.Getenv(asClient); path != "" {
		os.Exit(clientMain(path))
	}
	if path := os.Getenv(asListener); path != "" {
		os.Exit(listenerMain(path))
	}
	os.Exit(m.Run())
}

func clientMain(path string) int {
	c, err := dial(path)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	_, err = c.Status(ctx, &kmsapi.StatusRequest{})
	fmt.Printf("%s: %s\n", status.Code(err), status.Convert(err).Message())
	return 0
}

func listenerMain(path string) int {
	l, err := grpcserver.Listen(grpcserver.ListenConfig{Path: path})
	if err != nil {
		fmt.Println("error:", err)
		return 1
	}
	fmt.Println("listening")
	_, _ = os.Stdin.Read(make([]byte, 1))
	if err := l.Close(); err != nil {
		fmt.Println("error:", err)
	}
	return 0
}

// reexec is this test binary, as another user may run it, from a folder that
// everybody may enter.
func reexec(t *testing.T, uid uint32, env string) *exec.Cmd {
	t.Helper()
	exe, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(openDir(t), "client")
	if err := os.WriteFile(name, exe, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(name)
	cmd.Env = append(os.Environ(), env, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	if uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	return cmd
}

// openDir is a temporary folder that other users may enter.
func openDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kleidi")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// memoryKeys is a keyring of AES-GCM keys without anything sealed.
type memoryKeys struct {
	mu      sync.RWMutex
	current seal.KeyID
	keys    map[seal.KeyID]cipher.AEAD
	err     error // of every operation
	panics  any
	wait    chan struct{} // Encrypt waits for it
	entered chan struct{}
}

func newKeys(t testing.TB, ids ...seal.KeyID) *memoryKeys {
	t.Helper()
	k := &memoryKeys{keys: map[seal.KeyID]cipher.AEAD{}}
	for i, id := range ids {
		key := make([]byte, 32)
		key[0] = byte(i + 1)
		b, err := aes.NewCipher(key)
		if err != nil {
			t.Fatal(err)
		}
		if k.keys[id], err = cipher.NewGCMWithRandomNonce(b); err != nil {
			t.Fatal(err)
		}
		k.current = id
	}
	return k
}

func (k *memoryKeys) use(id seal.KeyID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.current = id
}

func (k *memoryKeys) fail(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.err = err
}

func (k *memoryKeys) CurrentID() (seal.KeyID, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if k.panics != nil {
		panic(k.panics)
	}
	return k.current, k.err
}

func (k *memoryKeys) Encrypt(p []byte) ([]byte, seal.KeyID, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if k.panics != nil {
		panic(k.panics)
	}
	if k.wait != nil {
		k.entered <- struct{}{}
		<-k.wait
	}
	if k.err != nil {
		return nil, "", k.err
	}
	out := append(make([]byte, 0, len(p)+29), 1)
	return k.keys[k.current].Seal(out, nil, p, []byte(k.current)), k.current, nil
}

func (k *memoryKeys) Decrypt(id seal.KeyID, c []byte) ([]byte, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if k.panics != nil {
		panic(k.panics)
	}
	if k.err != nil {
		return nil, k.err
	}
	a, ok := k.keys[id]
	switch {
	case !ok:
		return nil, fmt.Errorf("decrypt: %w", seal.ErrUnknownKey)
	case len(c) < 29 || c[0] != 1:
		return nil, fmt.Errorf("decrypt: %w", seal.ErrMalformed)
	}
	p, err := a.Open(nil, nil, c[1:], []byte(id))
	if err != nil {
		return nil, errors.Join(seal.ErrAuthentication, err)
	}
	return p, nil
}

// running is a server on a real socket.
type running struct {
	path string
	srv  *grpcserver.Server
	reg  *prometheus.Registry
	log  *safeBuffer
}

type safeBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func start(t testing.TB, keys grpcserver.Keys, cfg grpcserver.ListenConfig) *running {
	t.Helper()
	return startFor(t, keys, nil, cfg)
}

// startFor is start with callers.
func startFor(t testing.TB, keys grpcserver.Keys, callers grpcserver.Callers, cfg grpcserver.ListenConfig) *running {
	t.Helper()
	r := &running{path: filepath.Join(openDir(t), "kms.sock"), reg: prometheus.NewRegistry(), log: &safeBuffer{}}
	log := slog.New(slog.NewJSONHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	cfg.Path, cfg.Log = r.path, log
	l, err := grpcserver.Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.srv, err = grpcserver.New(keys, grpcserver.Options{Registerer: r.reg, Log: log, Callers: callers})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- r.srv.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // what a test left open is cut off
		r.srv.GracefulStop(ctx)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return r
}

func dial(path string) (kmsapi.KeyManagementServiceClient, error) {
	// The way kube-apiserver dials (k8s.io/apiserver, kmsv2/grpc_service.go).
	conn, err := grpc.NewClient("passthrough:///"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"), grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}))
	if err != nil {
		return nil, err
	}
	return kmsapi.NewKeyManagementServiceClient(conn), nil
}

func (r *running) client(t testing.TB) kmsapi.KeyManagementServiceClient {
	t.Helper()
	c, err := dial(r.path)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// wantError checks code and text of err.
func wantError(t *testing.T, err error, code codes.Code, texts ...string) {
	t.Helper()
	st := status.Convert(err)
	if st.Code() != code {
		t.Fatalf("got %v (%v), want %v", st.Code(), err, code)
	}
	for _, text := range texts {
		if !strings.Contains(st.Message(), text) {
			t.Errorf("message lacks %q: %s", text, st.Message())
		}
	}
}

func limited(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}
