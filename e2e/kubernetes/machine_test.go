package kubernetes

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
)

// reconnect bounds the time until kube-apiserver notices that a plugin is back: gRPC's
// back-off ends at 92 s, the probe adds 10 s.
const reconnect = 5 * time.Minute

// machine is a control-plane node: kleidi, etcd and kube-apiserver.
type machine struct {
	*node.Node
	etcd *cluster.Etcd
	api  *cluster.APIServer
}

// newMachine initialises kleidi on a separate machine and starts etcd. Neither kleidi
// nor kube-apiserver runs yet.
func newMachine(t *testing.T, version string) *machine {
	t.Helper()
	return newMachineOf(t, version, node.Setup{})
}

func newMachineOf(t *testing.T, version string, s node.Setup) *machine {
	t.Helper()
	n := node.Make(t, s)
	e := cluster.StartEtcd(t, binaries["etcd"], n.Dir())
	api := cluster.NewAPIServer(t, cluster.APIServerSetup{
		Binary: binaries[version], Host: cluster.Loopback, Dir: n.Dir(), Etcds: []string{e.URL},
		EncryptionConfig: cluster.Patient(t, n.EncryptionConfig()),
	})
	return &machine{Node: n, etcd: e, api: api}
}

// put stores a Secret with unique plaintext.
func (m *machine) put(t *testing.T, name string) {
	t.Helper()
	if err := cluster.Soon(func() error { return m.api.Put("secrets", name, map[string]string{"password": plaintext(name)}) }); err != nil {
		t.Fatalf("write Secret %s: %v", name, err)
	}
}

// plaintext is the content of Secret name, long enough to be found where it should not
// be.
func plaintext(name string) string { return "plaintext of " + name + ", as nobody else should read it" }

// holds returns an error unless Secrets read back as written.
func (m *machine) holds(names ...string) error {
	for _, name := range names {
		got, err := m.api.Secret(name)
		if err != nil {
			return fmt.Errorf("read Secret %s: %w", name, err)
		}
		if got["password"] != plaintext(name) {
			return fmt.Errorf("Secret %s reads %q", name, got["password"])
		}
	}
	return nil
}

func (m *machine) mustHold(t *testing.T, names ...string) {
	t.Helper()
	if err := m.holds(names...); err != nil {
		t.Fatal(err)
	}
}

// stored returns the raw Secrets in etcd by name.
func (m *machine) stored(t *testing.T) map[string]stored {
	t.Helper()
	const folder = "/registry/secrets/" + cluster.Namespace + "/"
	raw, err := m.etcd.Get(folder)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]stored{}
	for key, value := range raw {
		s, err := parseStored(value)
		if err != nil {
			t.Fatalf("%s: %v", key, err)
		}
		all[key[len(folder):]] = s
	}
	return all
}

// waitReady waits until kube-apiserver reports its plugin and itself as ready.
func (m *machine) waitReady(t *testing.T) {
	t.Helper()
	node.Eventually(t, reconnect, "kube-apiserver is ready", m.api.Ready)
}

// waitNotReady waits until kube-apiserver reports the KMS plugin, and nothing else, as
// not ready.
func (m *machine) waitNotReady(t *testing.T) {
	t.Helper()
	node.Eventually(t, reconnect, "kube-apiserver's readyz names the KMS plugin", func() error {
		err := m.api.Ready()
		var r *cluster.Refusal
		if !errors.As(err, &r) {
			return fmt.Errorf("readyz: %w", err)
		}
		if !bytes.Contains([]byte(r.Body), []byte("[-]kms-provider")) {
			return fmt.Errorf("readyz does not name the KMS plugin: %s", r.Body)
		}
		return nil
	})
}
