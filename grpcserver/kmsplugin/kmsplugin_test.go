package kmsplugin_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"
	"k8s.io/kms/pkg/service"

	"github.com/beezy-dev/kleidi/grpcserver/kmsplugin"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/sealtest"
)

// plugin is a KMS v2 plugin on Kubernetes' own library for servers.
type plugin struct {
	mu      sync.Mutex
	keys    map[string]cipher.AEAD
	current string
	healthz string
	version string
	answer  func(*service.EncryptResponse)
	decrypt func([]byte, error) ([]byte, error)
	socket  string
	server  *service.GRPCService
}

const annotation = "plugin.example.com/nonce"

// startPlugin runs a plugin with one key. Its log would drown the test's.
func startPlugin(t *testing.T) *plugin {
	t.Helper()
	p := &plugin{keys: map[string]cipher.AEAD{}, healthz: "ok", version: "v2", socket: filepath.Join(t.TempDir(), "kms.sock")}
	p.rotate(t)
	p.start(t)
	return p
}

func (p *plugin) start(t *testing.T) {
	t.Helper()
	p.server = service.NewGRPCService(p.socket, time.Minute, p)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = p.server.ListenAndServe()
	}()
	t.Cleanup(func() { p.server.Shutdown(); <-done })
	conn, err := grpc.NewClient("unix://"+p.socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := kmsapi.NewKeyManagementServiceClient(conn).Status(t.Context(), &kmsapi.StatusRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	p.mu.Lock() // after the call: the library's Shutdown and ListenAndServe are not synchronised
	defer p.mu.Unlock()
}

// rotate gives the plugin another key. It keeps the former ones.
func (p *plugin) rotate(t *testing.T) {
	t.Helper()
	block, err := aes.NewCipher([]byte(rand.Text()[:16]))
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.current = "key-" + rand.Text()
	p.keys[p.current] = aead
}

func (p *plugin) Status(context.Context) (*service.StatusResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return &service.StatusResponse{Version: p.version, Healthz: p.healthz, KeyID: p.current}, nil
}

func (p *plugin) Encrypt(_ context.Context, _ string, data []byte) (*service.EncryptResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	nonce := make([]byte, 12)
	rand.Read(nonce)
	r := &service.EncryptResponse{KeyID: p.current, Ciphertext: p.keys[p.current].Seal(nil, nonce, data, nil), Annotations: map[string][]byte{annotation: nonce}}
	if p.answer != nil {
		p.answer(r)
	}
	return r, nil
}

func (p *plugin) Decrypt(_ context.Context, _ string, r *service.DecryptRequest) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	aead, ok := p.keys[r.KeyID]
	if !ok || len(r.Annotations[annotation]) != 12 || len(r.Annotations) != 1 {
		return nil, errors.New("no such key\n\x1b[2J")
	}
	plain, err := aead.Open(nil, r.Annotations[annotation], r.Ciphertext, nil)
	if p.decrypt != nil {
		return p.decrypt(plain, err)
	}
	return plain, err
}

func wrapper(t testing.TB, socket string) *kmsplugin.Wrapper {
	t.Helper()
	w, err := kmsplugin.New(kmsplugin.Config{Socket: socket, Timeout: 30 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func newKEK(t testing.TB) *seal.Secret {
	t.Helper()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kek.Close() })
	return kek
}

func wrap(t testing.TB, w *kmsplugin.Wrapper, kek *seal.Secret) seal.Slot {
	t.Helper()
	slot, err := w.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	return slot
}

func TestConformance(t *testing.T) {
	sealtest.Run(t, func(t *testing.T) sealtest.Harness {
		return sealtest.Harness{
			Wrapper: wrapper(t, startPlugin(t).socket), Other: wrapper(t, startPlugin(t).socket),
			OtherCause: seal.CauseUnavailable, Stride: 5,
		}
	})
}

// TestKeyChanged: a slot of a former key opens, and Check says that it should be made again.
func TestKeyChanged(t *testing.T) {
	p := startPlugin(t)
	w, kek := wrapper(t, p.socket), newKEK(t)
	slot := wrap(t, w, kek)
	if id, err := kmsplugin.KeyID(slot); err != nil || id != p.current {
		t.Errorf("key ID %q, %v; want %s", id, err, p.current)
	}
	if warnings, err := w.Check(t.Context(), slot); err != nil || len(warnings) > 0 {
		t.Errorf("before the key changed: %q %v", warnings, err)
	}
	former := p.current
	p.rotate(t)
	warnings, err := w.Check(t.Context(), slot)
	if err != nil || len(warnings) != 1 || !strings.Contains(warnings[0], former) || !strings.Contains(warnings[0], p.current) || !strings.Contains(warnings[0], "kleidi slot rewrap") {
		t.Errorf("after the key changed: %q %v", warnings, err)
	}
	opened, err := w.Unwrap(t.Context(), slot)
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	if !opened.Equal(kek) {
		t.Error("another KEK")
	}
	if again, err := w.WrapLike(t.Context(), kek, slot); err != nil || !strings.Contains(kmsplugin.Describe(again), p.current) {
		t.Errorf("wrapped again: %s, %v", kmsplugin.Describe(again), err)
	}
}

// TestAnswers: a plugin's answer that kube-apiserver would refuse makes no slot.
func TestAnswers(t *testing.T) {
	p := startPlugin(t)
	w, kek := wrapper(t, p.socket), newKEK(t)
	for want, answer := range map[string]func(*service.EncryptResponse){
		"a key ID of 0 bytes":          func(r *service.EncryptResponse) { r.KeyID = "" },
		"a key ID of 1025 bytes":       func(r *service.EncryptResponse) { r.KeyID = strings.Repeat("k", 1025) },
		"a ciphertext of 0 bytes":      func(r *service.EncryptResponse) { r.Ciphertext = nil },
		"a ciphertext of 1025 bytes":   func(r *service.EncryptResponse) { r.Ciphertext = make([]byte, 1025) },
		"annotations of 32769 bytes":   func(r *service.EncryptResponse) { r.Annotations = map[string][]byte{"a": make([]byte, 32<<10)} },
		"received message larger than": func(r *service.EncryptResponse) { r.Ciphertext = make([]byte, 1<<20) },
	} {
		p.answer = answer
		_, err := w.Wrap(t.Context(), kek)
		if seal.CauseOf(err) != seal.CauseUnavailable || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	p.answer = func(r *service.EncryptResponse) { r.Ciphertext = bytes.Repeat([]byte{1}, 1024) }
	if _, err := w.Wrap(t.Context(), kek); err != nil {
		t.Errorf("the largest ciphertext: %v", err)
	}
}

// TestNoKEK: the bytes that the plugin decrypts must have the size of a KEK.
func TestNoKEK(t *testing.T) {
	p := startPlugin(t)
	w, kek := wrapper(t, p.socket), newKEK(t)
	slot := wrap(t, w, kek)
	for _, n := range []int{0, seal.KEKSize - 1, seal.KEKSize + 1} {
		p.decrypt = func([]byte, error) ([]byte, error) { return make([]byte, n), nil }
		if _, err := w.Unwrap(t.Context(), slot); seal.CauseOf(err) != seal.CauseSlotCorrupt {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

// TestUnhealthy: Check reports why the plugin can't serve.
func TestUnhealthy(t *testing.T) {
	p := startPlugin(t)
	w := wrapper(t, p.socket)
	slot := wrap(t, w, newKEK(t))
	for want, spoil := range map[string]func(){
		`it is not healthy: "sealed"`: func() { p.healthz = "sealed" },
		`version "v1", want v2`:       func() { p.version = "v1" },
		"a key ID of 0 bytes":         func() { p.current = "" },
	} {
		healthz, version, current := p.healthz, p.version, p.current
		spoil()
		if _, err := w.Check(t.Context(), slot); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %s: %v", want, err)
		}
		p.healthz, p.version, p.current = healthz, version, current
	}
}

// TestRefused: a listener that is neither root nor this user receives no KEK and no slot,
// and a plugin's text is quoted.
func TestRefused(t *testing.T) {
	p := startPlugin(t)
	w, kek := wrapper(t, p.socket), newKEK(t)
	slot := wrap(t, w, kek)
	clear(p.keys)
	_, err := w.Unwrap(t.Context(), slot)
	if err == nil || strings.ContainsAny(err.Error(), "\n\x1b") || !strings.Contains(err.Error(), "no such key") {
		t.Errorf("a refusal: %q", err)
	}
	p.server.Shutdown()
	if _, err := w.Unwrap(t.Context(), slot); seal.CauseOf(err) != seal.CauseUnavailable {
		t.Errorf("no plugin: %v", err)
	}
	open := filepath.Join(t.TempDir(), "open")
	if err := os.Mkdir(open, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil { // whatever the umask is
		t.Fatal(err)
	}
	q := &plugin{keys: maps.Clone(p.keys), healthz: "ok", version: "v2", socket: filepath.Join(open, "kms.sock")}
	q.rotate(t)
	q.start(t)
	if _, err := wrapper(t, q.socket).Wrap(t.Context(), kek); seal.CauseOf(err) != seal.CauseConfiguration || !strings.Contains(err.Error(), open) {
		t.Errorf("a folder that all may write: %v", err)
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []kmsplugin.Config{{Socket: "unix:///run/kms.sock", Timeout: time.Second}, {Socket: "", Timeout: time.Second}, {Socket: "/s", Timeout: time.Millisecond}, {Socket: "/s", Timeout: time.Hour}} {
		if _, err := kmsplugin.New(c); err == nil {
			t.Errorf("%+v is taken", c)
		}
	}
}

// FuzzSlot: no slot makes the parser panic, and one that is read can be described.
func FuzzSlot(f *testing.F) {
	f.Add([]byte(`{"format":1,"keyID":"k","ciphertext":"AA==","annotations":{"a.example.com/b":"AA=="}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := seal.Slot{Type: seal.TypeKMSPlugin, Data: data}
		id, err := kmsplugin.KeyID(s)
		if (err == nil) == (kmsplugin.Describe(s) == "unreadable") || err == nil && (id == "" || len(id) > 1024) {
			t.Errorf("%q: %q %v", data, id, err)
		}
	})
}

// TestLaterFormat: a slot of a later kleidi is refused, and not guessed at.
func TestLaterFormat(t *testing.T) {
	s := seal.Slot{Type: seal.TypeKMSPlugin, Data: []byte(`{"format":2,"keyID":"k","ciphertext":"AA=="}`)}
	if _, err := kmsplugin.KeyID(s); seal.CauseOf(err) != seal.CauseSlotCorrupt || !strings.Contains(err.Error(), "format 2") {
		t.Error(err)
	}
}

// TestSilentPlugin: a plugin that takes a call and does not answer is given up.
func TestSilentPlugin(t *testing.T) {
	p := startPlugin(t)
	end := make(chan struct{})
	defer close(end)
	p.answer = func(*service.EncryptResponse) { <-end }
	w, err := kmsplugin.New(kmsplugin.Config{Socket: p.socket, Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	kek, err := seal.Memory{}.Take(make([]byte, seal.KEKSize))
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if _, err := w.Wrap(ctx, kek); seal.CauseOf(err) != seal.CauseUnavailable {
		t.Errorf("%v, want the cause %s", err, seal.CauseUnavailable)
	}
	if ctx.Err() != nil {
		t.Error("only the caller's own limit ended the call")
	}
}
