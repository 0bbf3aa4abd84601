package kubernetes

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// machine is a control-plane node: a swtpm that booted, kleidi, etcd and kube-apiserver.
type machine struct {
	*tpmtest.Machine
	dir      string
	boot     simboot.Boot
	config   string // kleidi's configuration file
	http     string // kleidi's HTTP address
	identity string // file with the recovery identity
	kleidi   *process
	etcd     *etcd
	api      *apiserver
}

// newMachine boots a machine, initialises kleidi on it and starts etcd. Neither
// kleidi nor kube-apiserver runs yet.
func newMachine(t *testing.T, version string) *machine {
	t.Helper()
	boot := simboot.Baseline(simboot.UKI)
	m := &machine{Machine: tpmtest.New(t, boot), boot: boot, http: "127.0.0.1:" + freePort(t)}
	m.dir = m.Dir()
	m.configure(t)
	recipient := m.makeIdentity(t)
	m.run(t, "init", "--recovery-recipient", recipient)

	encryption := m.path("encryption.yaml")
	if err := os.WriteFile(encryption, m.run(t, "encryption-config"), 0o600); err != nil {
		t.Fatal(err)
	}
	m.etcd = startEtcd(t, m.dir)
	m.api = newAPIServer(t, version, m.dir, m.etcd, encryption)
	return m
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

func (m *machine) configure(t *testing.T) {
	t.Helper()
	m.config = m.path("config.yaml")
	config := fmt.Sprintf(`apiVersion: kleidi.beezy.dev/v1alpha1
kind: KleidiConfiguration
tpm:
  device: %s
  eventLog: %s
state:
  dir: %s
kms:
  socket: %s
admin:
  socket: %s
http:
  address: %s
`, m.Device(), m.EventLog(), m.path("state"), m.path("run/kms.sock"), m.path("run/admin.sock"), m.http)
	if err := os.WriteFile(m.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(m.path("run"), 0o700); err != nil {
		t.Fatal(err)
	}
}

// makeIdentity makes the recovery identity as an operator would with age-keygen,
// and returns its recipient.
func (m *machine) makeIdentity(t *testing.T) string {
	t.Helper()
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	m.identity = m.path("recovery.txt")
	if err := os.WriteFile(m.identity, []byte(identity.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return identity.Recipient().String()
}

// run runs a verb of kleidi, which must succeed, and returns what it prints.
func (m *machine) run(t *testing.T, verb string, args ...string) []byte {
	t.Helper()
	out, err := m.try(verb, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// try runs a verb of kleidi, which may fail.
func (m *machine) try(verb string, args ...string) ([]byte, error) {
	var stderr bytes.Buffer
	cmd := exec.Command(binaries["kleidi"], append([]string{verb}, append(args, "--config", m.config)...)...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("kleidi %s: %w\n%s%s", verb, err, out, stderr.Bytes())
	}
	return out, nil
}

// serve starts kleidi and returns once it answers over HTTP, open or locked.
func (m *machine) serve(t *testing.T) {
	t.Helper()
	m.kleidi = start(t, m.path("kleidi.log"), binaries["kleidi"], "serve", "--config", m.config)
	eventually(t, 20*time.Second, "kleidi serves", func() error {
		if err := m.kleidi.alive(); err != nil {
			t.Fatal(err)
		}
		_, _, err := m.get("/livez")
		return err
	})
}

// serveOpen starts kleidi and returns once its KEK is open.
func (m *machine) serveOpen(t *testing.T) {
	t.Helper()
	m.serve(t)
	m.waitOpen(t)
}

func (m *machine) waitOpen(t *testing.T) {
	t.Helper()
	eventually(t, 20*time.Second, "kleidi is open", func() error {
		code, body, err := m.get("/readyz")
		if err == nil && code != http.StatusOK {
			err = &refusal{code, body}
		}
		return err
	})
}

// get asks kleidi itself over HTTP.
func (m *machine) get(path string) (code int, body string, err error) {
	res, err := http.Get("http://" + m.http + path)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, string(b), err
}

// keyring is what the tests read of `kleidi keyring show -o json`.
type keyring struct {
	ClusterID string
	Revision  uint64
	Current   struct {
		KeyID string
		Slots []struct {
			Type, Node string
			Data       json.RawMessage
		}
	}
	Retired []struct{ KeyID string }
}

func (m *machine) keyring(t *testing.T) keyring {
	t.Helper()
	var k keyring
	if err := json.Unmarshal(m.run(t, "keyring", "show", "-o", "json"), &k); err != nil {
		t.Fatal(err)
	}
	if k.Current.KeyID == "" {
		t.Fatal("kleidi keyring show -o json names no current key ID")
	}
	return k
}

// put stores a Secret whose content is plaintext of its own.
func (m *machine) put(t *testing.T, name string) {
	t.Helper()
	if err := m.api.put("secrets", name, map[string]string{"password": plaintext(name)}); err != nil {
		t.Fatalf("write Secret %s: %v", name, err)
	}
}

// plaintext is what Secret name holds: long enough to be found where it should not be.
func plaintext(name string) string { return "plaintext of " + name + ", as nobody else should read it" }

// holds says whether Secrets read back as they were written.
func (m *machine) holds(names ...string) error {
	for _, name := range names {
		got, err := m.api.secret(name)
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
	const folder = "/registry/secrets/" + namespace + "/"
	raw, err := m.etcd.get(folder)
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

// waitReady waits until kube-apiserver reports its plugin, and itself, as ready.
func (m *machine) waitReady(t *testing.T) {
	t.Helper()
	eventually(t, reconnect, "kube-apiserver is ready", m.api.ready)
}

// waitNotReady waits until kube-apiserver blames the KMS plugin, and only it.
func (m *machine) waitNotReady(t *testing.T) {
	t.Helper()
	eventually(t, reconnect, "kube-apiserver's readyz names the KMS plugin", func() error {
		err := m.api.ready()
		var r *refusal
		if !errors.As(err, &r) {
			return fmt.Errorf("readyz: %w", err)
		}
		if !bytes.Contains([]byte(r.body), []byte("[-]kms-provider")) {
			return fmt.Errorf("readyz does not name the KMS plugin: %s", r.body)
		}
		return nil
	})
}
