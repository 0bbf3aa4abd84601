package ha

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	manifests "github.com/beezy-dev/kleidi/deploy/cluster"
	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// controlPlane is three nodes over one etcd.
type controlPlane struct {
	t     *testing.T // the servers end with it
	etcd  []*cluster.Etcd
	nodes []*machine
}

// machine is one node: kleidi and kube-apiserver on a host.
type machine struct {
	*node.Node
	name string
	host cluster.Host
	api  *cluster.APIServer
}

// newControlPlane starts etcd, and prepares the nodes: the first has a keyring, and the
// others have none yet. encrypt names the resources that are encrypted.
func newControlPlane(t *testing.T, encrypt string) *controlPlane {
	t.Helper()
	dir := t.TempDir()
	c := &controlPlane{t: t, etcd: cluster.NewMembers(network.Hosts, binaries["etcd"], dir)}
	var urls []string
	for _, e := range c.etcd {
		e.Start(t)
		urls = append(urls, e.URL)
	}
	accounts := filepath.Join(dir, "accounts.pem")
	if err := os.WriteFile(accounts, cluster.ServiceAccountKey(t), 0o600); err != nil {
		t.Fatal(err)
	}
	for i, h := range network.Hosts {
		name := fmt.Sprint("cp-", i+1)
		settings := fmt.Sprintf("node: %s\njoin:\n  listen: %s:9778\n", name, h.Address)
		n := node.Make(t, node.Setup{On: h.Command(), Settings: settings, Uninitialised: i > 0})
		n.Configure(settings + "cluster:\n  kubeconfig: " + n.Path("admin.conf") + "\n")
		m := &machine{Node: n, name: name, host: h}
		m.api = cluster.NewAPIServer(t, cluster.APIServerSetup{
			Binary: binaries[apiserver], Host: h, Dir: n.Dir(), Etcds: urls, EncryptionConfig: n.EncryptionConfig("--resources", encrypt),
			ServiceAccounts: accounts, Token: "e2e",
		})
		m.api.Kubeconfig(t)
		c.nodes = append(c.nodes, m)
	}
	for _, e := range c.etcd {
		e.WaitHealthy(t)
	}
	return c
}

// leader returns the etcd member that leads.
func (c *controlPlane) leader(t *testing.T) *cluster.Etcd {
	t.Helper()
	for _, e := range c.etcd {
		leads, err := e.Leads()
		must(t, err)
		if leads {
			return e
		}
	}
	t.Fatal("no member of etcd leads")
	return nil
}

// share starts the first node, and has it hand its keyring over to the cluster store.
func (c *controlPlane) share(t *testing.T) {
	t.Helper()
	first := c.nodes[0]
	first.ServeOpen()
	first.api.Start(t)
	client, err := kube.NewClient(kube.Options{Kubeconfig: first.Path("admin.conf")})
	must(t, err)
	must(t, client.Apply(t.Context(), manifests.CRDs))
	c.approve(t, first, c.nodes[1]) // writes format 2, which can be shared
	first.Serving.Kill()
	first.ServeOpen()
	node.Eventually(t, time.Minute, "the cluster store holds the keyring", func() error {
		if list := first.list(t); list.Commit != "cluster" {
			return fmt.Errorf("it is committed: %s", list.Commit)
		}
		return nil
	})
}

// nodeList is the part of `kleidi node list -o json` that the tests read.
type nodeList struct {
	Revision uint64
	KeyID    string
	Commit   string
	Nodes    []struct {
		Node       string
		Unfinished bool
	}
}

func (m *machine) list(t *testing.T) (list nodeList) {
	t.Helper()
	m.JSON(&list, "node", "list")
	return list
}

// approve lets a machine join: the operator compares its EK, and approves it on a node.
// It returns the arguments of the printed command.
func (c *controlPlane) approve(t *testing.T, by, m *machine) []string {
	t.Helper()
	var identity struct{ EK string }
	m.JSON(&identity, "node", "identity")
	policy := c.nodes[0].Path("policy.yaml")
	if _, err := os.Stat(policy); err != nil {
		c.nodes[0].Run("bootpolicy", "record", "--file", policy)
	}
	return joinCommand(t, by.Run("node", "approve", m.name, "--ek", identity.EK, "--boot-policy", policy))
}

// admit approves a machine on a node, and runs the printed command on the machine.
func (c *controlPlane) admit(t *testing.T, by, m *machine) {
	t.Helper()
	m.Run("join", c.approve(t, by, m)...)
}

// consistent returns once all nodes have the same keyring, and it lists exactly them.
func (c *controlPlane) consistent(t *testing.T, nodes ...*machine) {
	t.Helper()
	node.Eventually(t, time.Minute, "the nodes are in step", func() error {
		first := nodes[0].list(t)
		for _, m := range nodes {
			switch list := m.list(t); {
			case list.KeyID != first.KeyID || list.Revision != first.Revision || list.Commit != "cluster":
				return fmt.Errorf("%s has revision %d, %s; %s has %d, %s (%s)", nodes[0].name, first.Revision, first.KeyID, m.name, list.Revision, list.KeyID, list.Commit)
			case len(list.Nodes) != len(nodes):
				return fmt.Errorf("%s lists %+v", m.name, list.Nodes)
			}
			if code, body, err := m.Get("/readyz"); err != nil || code != 200 || strings.Contains(body, "cluster store: ") {
				return fmt.Errorf("%s: %d %s %w", m.name, code, body, err)
			}
		}
		return nil
	})
}

// joinCommand returns the arguments of the kleidi join that node approve has printed.
func joinCommand(t *testing.T, said []byte) []string {
	t.Helper()
	_, command, ok := strings.Cut(string(said), "kleidi join ")
	if !ok {
		t.Fatalf("node approve prints no command:\n%s", said)
	}
	command, _, _ = strings.Cut(command, "\n")
	return strings.Fields(command)
}

// put writes a Secret through a node, with plaintext as its content.
func (m *machine) put(name string) error {
	return m.api.Put("secrets", name, map[string]string{"password": plaintext(name)})
}

func plaintext(name string) string { return "plaintext of " + name }

// holds returns an error unless Secrets read through a node as they were written.
func (m *machine) holds(names ...string) error {
	for _, name := range names {
		got, err := m.api.Secret(name)
		if err != nil {
			return fmt.Errorf("%s: read Secret %s: %w", m.name, name, err)
		}
		if got["password"] != plaintext(name) {
			return fmt.Errorf("%s: Secret %s reads %q", m.name, name, got["password"])
		}
	}
	return nil
}

// everywhere checks that each of these Secrets reads through each node.
func (c *controlPlane) everywhere(t *testing.T, names ...string) {
	t.Helper()
	for _, m := range c.nodes {
		if err := m.holds(names...); err != nil {
			t.Error(err)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// writer writes Secrets through a node and reads each back, until it is stopped.
type writer struct {
	stop chan struct{}
	done chan error
	n    atomic.Int64
}

func (m *machine) write(prefix string) *writer {
	w := &writer{stop: make(chan struct{}), done: make(chan error, 1)}
	go func() {
		for {
			select {
			case <-w.stop:
				w.done <- nil
				return
			default:
			}
			name := fmt.Sprint(prefix, "-", w.n.Load())
			if err := errors.Join(m.put(name), m.holds(name)); err != nil {
				w.done <- err
				return
			}
			w.n.Add(1)
		}
	}()
	return w
}

// end stops the writer. None of its writes and reads may have failed.
func (w *writer) end(t *testing.T) {
	t.Helper()
	close(w.stop)
	if err := <-w.done; err != nil {
		t.Errorf("after %d Secrets: %v", w.n.Load(), err)
	}
	if w.n.Load() == 0 {
		t.Error("no Secret was written meanwhile")
	}
}
