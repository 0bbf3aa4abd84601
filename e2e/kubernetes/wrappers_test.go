package kubernetes

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// backend is a wrapper other than the TPM, with its surroundings.
type backend struct {
	name string
	// setup starts the backend. It returns the backend's part of the configuration, and
	// a kleidi binary that supports it.
	setup func(t *testing.T) (settings, binary string)
}

var backends = []backend{
	{"pkcs11", func(t *testing.T) (string, string) { return newToken(t), withPKCS11(t) }},
	{"vault", func(t *testing.T) (string, string) { return startVault(t), node.Binary(t) }},
}

// order returns kleidi's configuration for these wrappers. Without the TPM among them,
// kleidi has nothing to attest with.
func order(settings string, wrappers ...string) string {
	attests := wrappers[0] == "tpm"
	return fmt.Sprintf("unlock: {order: [%s], requireAttestation: %t}\n%s", strings.Join(wrappers, ", "), attests, settings)
}

// TestInsteadOfTPM tests the main purpose on a machine without a TPM.
func TestInsteadOfTPM(t *testing.T) {
	t.Parallel()
	for _, b := range backends {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			settings, binary := b.setup(t)
			m := newMachineOf(t, versions[0], node.Setup{Binary: binary, Settings: order(settings, b.name), NoTPM: true})
			m.ServeOpen()
			m.liveThrough(t)
		})
	}
}

// TestFallback tests the main purpose when the TPM refuses the boot and another wrapper
// may open in its place.
func TestFallback(t *testing.T) {
	t.Parallel()
	for _, b := range backends {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			settings, binary := b.setup(t)
			m := newMachineOf(t, versions[0], node.Setup{Binary: binary, Settings: order(settings, "tpm", b.name)})
			m.ServeOpen()
			m.api.Start(t)
			m.waitReady(t)
			m.put(t, "sealed")
			m.api.Stop()
			m.Serving.Stop()

			other := m.Kernel
			other.Kernel = "6.1.0-666-amd64"
			m.Reboot(other)
			m.ServeOpen()
			m.saysFallback(t, b.name)
			m.liveThrough(t)
			m.mustHold(t, "sealed")
			m.saysFallback(t, b.name)

			t.Log("the TPM's slot is sealed to this boot")
			m.Run("reseal")
			m.Serving.Stop()
			m.ServeOpen()
			if _, body, err := m.Get("/readyz"); err != nil || strings.Contains(body, "fallback") {
				t.Errorf("it is still said to be a fallback: %s (%v)", body, err)
			}
			m.waitReady(t)
			m.mustHold(t, "sealed", "first", "second", "third")
		})
	}
}

// saysFallback demands that a fallback is reported loudly.
func (m *machine) saysFallback(t *testing.T, by string) {
	t.Helper()
	code, body, err := m.Get("/readyz")
	if want := "fallback: opened by " + by + ", since: the machine booted with another kernel"; err != nil || code != http.StatusOK || !strings.Contains(body, want) {
		t.Errorf("readyz does not say %q: %d %s (%v)", want, code, body, err)
	}
}

// liveThrough writes, reads, restarts and rotates. kleidi must be open when it begins;
// kube-apiserver runs when it ends.
func (m *machine) liveThrough(t *testing.T) {
	t.Helper()
	m.api.Start(t)
	m.waitReady(t)
	m.put(t, "first")
	m.mustHold(t, "first")
	before := m.Keyring().Current.KeyID
	if id := m.stored(t)["first"].keyID; id != before {
		t.Errorf("stored under %q, the current key is %q", id, before)
	}

	t.Log("both restart")
	m.api.Stop()
	m.Serving.Stop()
	m.ServeOpen()
	m.api.Start(t)
	m.waitReady(t)
	m.mustHold(t, "first")
	m.put(t, "second")

	t.Log("the KEK is rotated")
	m.Run("rotate")
	after := m.Keyring().Current.KeyID
	if after == before {
		t.Fatal("the key is not rotated")
	}
	node.Eventually(t, 4*time.Minute, "a new Secret is stored under the new key", func() error {
		if err := m.api.Ready(); err != nil {
			return err
		}
		m.put(t, "third")
		if id := m.stored(t)["third"].keyID; id != after {
			return errors.New("stored under " + id)
		}
		return nil
	})
	m.api.Stop()
	m.Serving.Stop()
	m.ServeOpen()
	m.api.Start(t)
	m.waitReady(t)
	m.mustHold(t, "first", "second", "third")
}
