package nodetest

import (
	"context"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// Plugin is a KMS v2 plugin with a key in memory: the wrapper for tests that need one that
// works, and no TPM.
type Plugin struct {
	t      testing.TB
	socket string
	stop   func()

	mu  sync.Mutex
	key *keyring.Keyring // encrypts and decrypts what the plugin is given
}

// NewPlugin starts a plugin, which ends with the test.
func NewPlugin(t testing.TB) *Plugin {
	t.Helper()
	p := &Plugin{t: t, socket: filepath.Join(t.TempDir(), "kms.sock")}
	p.Replace()
	p.Start()
	t.Cleanup(p.Stop)
	return p
}

// Configured is an amendment: the plugin is configured, and unlock.order does not name it.
func (p *Plugin) Configured(c *config.Config) { c.KMSPlugin.Socket = p.socket }

// Opens is an amendment: the plugin alone opens the keyring, without attestation.
func (p *Plugin) Opens(c *config.Config) {
	p.Configured(c)
	Opens(seal.TypeKMSPlugin)(c)
}

// Replace gives the plugin another key. The former one is lost.
func (p *Plugin) Replace() {
	p.t.Helper()
	k := Keyring(p.t, seal.Slot{Type: seal.TypeRecovery, Data: []byte("{}")})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.key = k
}

// Start lets the plugin listen again after Stop.
func (p *Plugin) Start() {
	p.t.Helper()
	l, err := grpcserver.Listen(grpcserver.ListenConfig{Path: p.socket})
	if err != nil {
		p.t.Fatal(err)
	}
	s, err := grpcserver.New(p, grpcserver.Options{})
	if err != nil {
		p.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	p.stop = sync.OnceFunc(func() {
		s.GracefulStop(context.Background())
		<-done
	})
}

// Stop ends the plugin: its socket is gone.
func (p *Plugin) Stop() { p.stop() }

func (p *Plugin) current() *keyring.Keyring {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.key
}

// CurrentID implements [grpcserver.Keys].
func (p *Plugin) CurrentID() (seal.KeyID, error) { return p.current().CurrentID(), nil }

// Encrypt implements [grpcserver.Keys].
func (p *Plugin) Encrypt(plaintext []byte) ([]byte, seal.KeyID, error) {
	return p.current().Encrypt(plaintext)
}

// Decrypt implements [grpcserver.Keys].
func (p *Plugin) Decrypt(id seal.KeyID, ciphertext []byte) ([]byte, error) {
	return p.current().Decrypt(id, ciphertext)
}

// Keyring returns a keyring of format 1 of the node cp-1, with a fresh KEK that these slots
// only pretend to hold.
func Keyring(t testing.TB, slots ...seal.Slot) *keyring.Keyring {
	t.Helper()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	k, err := keyring.New(seal.ClusterID{1}, kek, slots, []keyring.Node{{Name: "cp-1"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}
