// Package kmsclient runs kube-apiserver's own client code, without a kube-apiserver,
// against the kleidi binary: it reads the EncryptionConfiguration, probes the plugin,
// makes DEK seeds, and encrypts and decrypts objects as for storage. A restart of
// kube-apiserver means loading the configuration again.
package kmsclient

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"
	kmstypes "k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2/v2"

	"github.com/beezy-dev/kleidi/e2e/node"
)

const prefix = "k8s:enc:kms:v2:kleidi:"

// noticed bounds the time until kube-apiserver notices a changed key ID or a plugin
// that came back: health checks probe the plugin, but kube-apiserver uses a probe's
// answer for 20 s.
const noticed = 4 * time.Minute

// apiserver is the state of a kube-apiserver after it read its EncryptionConfiguration.
type apiserver struct {
	ctx context.Context
	*encryptionconfig.EncryptionConfiguration
}

func load(t *testing.T, n *node.Node) *apiserver {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	file := n.EncryptionConfig()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	// A busy machine may need more than the 3 s of a call.
	if err := os.WriteFile(file, bytes.Replace(b, []byte("timeout: 3s"), []byte("timeout: 1m"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	config, err := encryptionconfig.LoadEncryptionConfig(ctx, file, false, "apiserver")
	if err != nil {
		t.Fatal(err)
	}
	return &apiserver{ctx, config}
}

// loadReady returns once the first DEK seed is made.
func loadReady(t *testing.T, n *node.Node) *apiserver {
	t.Helper()
	a := load(t, n)
	node.Eventually(t, noticed, "a seed is made", a.healthy)
	return a
}

func (a *apiserver) healthy() error {
	req, err := http.NewRequestWithContext(a.ctx, http.MethodGet, "/healthz", nil)
	if err != nil {
		return err
	}
	return a.HealthChecks[0].Check(req)
}

func (a *apiserver) secrets() value.Transformer {
	return a.Transformers[schema.GroupResource{Resource: "secrets"}]
}

// at returns the key in etcd, which authenticates the place of a value.
func at(name string) value.Context {
	return value.DefaultContext("/registry/secrets/default/" + name)
}

func (a *apiserver) store(t *testing.T, name string) []byte {
	t.Helper()
	b, err := a.secrets().TransformToStorage(a.ctx, []byte("plaintext of "+name), at(name))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(b, []byte(prefix)) {
		t.Fatalf("stored value begins %.40q, want %q", b, prefix)
	}
	return b
}

// read reports whether the value is stale, that is, stored under a key other than the
// current one.
func (a *apiserver) read(name string, stored []byte) (stale bool, err error) {
	plain, stale, err := a.secrets().TransformFromStorage(a.ctx, stored, at(name))
	if err == nil && string(plain) != "plaintext of "+name {
		err = fmt.Errorf("%s reads %q", name, plain)
	}
	return stale, err
}

func (a *apiserver) mustRead(t *testing.T, name string, stored []byte, wantStale bool) {
	t.Helper()
	stale, err := a.read(name, stored)
	if err != nil {
		t.Fatal(err)
	}
	if stale != wantStale {
		t.Errorf("%s is stale: %v, want %v", name, stale, wantStale)
	}
}

func parse(t *testing.T, stored []byte) *kmstypes.EncryptedObject {
	t.Helper()
	object := new(kmstypes.EncryptedObject)
	if err := proto.Unmarshal(bytes.TrimPrefix(stored, []byte(prefix)), object); err != nil {
		t.Fatal(err)
	}
	return object
}

// TestManyRestarts makes the DEK seeds of twenty starts. One more start must decrypt
// all of them.
func TestManyRestarts(t *testing.T) {
	n := node.New(t)
	n.ServeOpen()
	current := n.Keyring().Current.KeyID
	stored := map[string][]byte{}
	for i := range 20 {
		name := fmt.Sprint("restart-", i)
		stored[name] = loadReady(t, n).store(t, name)
		if id := parse(t, stored[name]).KeyID; id != current {
			t.Fatalf("stored under key %q, the current key is %q", id, current)
		}
	}
	n.Serving.Stop()
	n.ServeOpen()
	a := loadReady(t, n)
	for name, b := range stored {
		a.mustRead(t, name, b, false)
	}
}

// TestTampered changes stored values: their place, key ID or encrypted seed.
func TestTampered(t *testing.T) {
	n := node.New(t)
	n.ServeOpen()
	stored := loadReady(t, n).store(t, "one")
	a := loadReady(t, n)
	a.mustRead(t, "one", stored, false)
	if _, err := a.read("other", stored); err == nil {
		t.Error("a value is accepted in another place")
	}
	for what, change := range map[string]func(*kmstypes.EncryptedObject){
		"key ID of no key": func(o *kmstypes.EncryptedObject) { o.KeyID = "k1-" + strings.Repeat("a", 52) },
		"changed key ID":   func(o *kmstypes.EncryptedObject) { o.KeyID += "x" },
		"changed seed":     func(o *kmstypes.EncryptedObject) { o.EncryptedDEKSource[len(o.EncryptedDEKSource)-1] ^= 1 },
		"cut seed":         func(o *kmstypes.EncryptedObject) { o.EncryptedDEKSource = o.EncryptedDEKSource[:5] },
		"unknown format":   func(o *kmstypes.EncryptedObject) { o.EncryptedDEKSource[0] ^= 0x80 },
	} {
		object := parse(t, stored)
		change(object)
		b, err := proto.Marshal(object)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.read("one", append([]byte(prefix), b...)); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	a.mustRead(t, "one", stored, false)
}

// TestRotation rotates the KEK under a running client.
func TestRotation(t *testing.T) {
	n := node.New(t)
	n.ServeOpen()
	a := loadReady(t, n)
	before := a.store(t, "before")
	n.Run("rotate")
	node.Eventually(t, noticed, "the old value is stale", func() error {
		if err := a.healthy(); err != nil {
			return err
		}
		stale, err := a.read("before", before)
		if err == nil && !stale {
			err = fmt.Errorf("not stale")
		}
		return err
	})
	after := a.store(t, "after")
	if id, current := parse(t, after).KeyID, n.Keyring().Current.KeyID; id != current || id == parse(t, before).KeyID {
		t.Errorf("stored under key %q, the current key is %q", id, current)
	}
	next := loadReady(t, n)
	next.mustRead(t, "before", before, true)
	next.mustRead(t, "after", after, false)
}

// TestLocked boots another kernel: nothing is encrypted or decrypted and the
// health check says so, until the recovery identity opens the keyring.
func TestLocked(t *testing.T) {
	n := node.New(t)
	n.ServeOpen()
	before := loadReady(t, n).store(t, "before")
	n.Serving.Stop()

	other := n.Kernel
	other.Kernel = "6.1.0-666-amd64"
	n.Reboot(other)
	n.Serve()
	n.WaitLocked("PCR 4")
	a := load(t, n)
	if err := a.healthy(); err == nil {
		t.Error("the health check passes while kleidi is locked")
	}
	if _, err := a.read("before", before); err == nil {
		t.Error("a value is readable while kleidi is locked")
	}
	if _, err := a.secrets().TransformToStorage(a.ctx, []byte("x"), at("x")); err == nil {
		t.Error("a value is written while kleidi is locked")
	}

	n.Run("recover", "--identity-file", n.Identity)
	n.WaitOpen()
	node.Eventually(t, noticed, "the client is healthy", a.healthy)
	a.mustRead(t, "before", before, true)
	a.mustRead(t, "after", a.store(t, "after"), false)
}
