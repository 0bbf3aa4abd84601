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

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
)

// controlPlane is three nodes over one etcd.
type controlPlane struct {
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
// others have none yet.
func newControlPlane(t *testing.T) *controlPlane {
	t.Helper()
	dir := t.TempDir()
	c := &controlPlane{etcd: cluster.NewMembers(network.Hosts, binaries["etcd"], dir)}
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
		m := &machine{Node: n, name: name, host: h}
		m.api = cluster.NewAPIServer(t, cluster.APIServerSetup{
			Binary: binaries[apiserver], Host: h, Dir: n.Dir(), Etcds: urls, EncryptionConfig: n.EncryptionConfig(),
			ServiceAccounts: accounts, Token: "e2e",
		})
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

// admit lets a machine join: the operator compares its EK, approves it on the first
// node, and runs the printed command on the machine.
func (c *controlPlane) admit(t *testing.T, m *machine) {
	t.Helper()
	var identity struct{ EK string }
	m.JSON(&identity, "node", "identity")
	policy := c.nodes[0].Path("policy.yaml")
	if _, err := os.Stat(policy); err != nil {
		c.nodes[0].Run("bootpolicy", "record", "--file", policy)
	}
	m.Run("join", joinCommand(t, c.nodes[0].Run("node", "approve", m.name, "--ek", identity.EK, "--boot-policy", policy))...)
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

// TestThreeNodes: two more nodes receive the first node's keyring, one of them while
// Secrets are written. Every node reads every Secret, whichever node wrote it, and
// whatever restarts or is cut off.
func TestThreeNodes(t *testing.T) {
	c := newControlPlane(t)
	first, second, third := c.nodes[0], c.nodes[1], c.nodes[2]
	first.ServeOpen()
	first.api.Start(t)
	must(t, first.put("before"))

	t.Log("the second node joins while Secrets are written")
	w := first.write("joining")
	c.admit(t, second)
	second.ServeOpen()
	second.api.Start(t)
	w.end(t)
	t.Log("the third node joins")
	c.admit(t, third)
	third.ServeOpen()
	third.api.Start(t)
	names := []string{"before", "joining-0"}
	for _, m := range c.nodes {
		must(t, m.put("by-"+m.name))
		names = append(names, "by-"+m.name)
	}
	c.everywhere(t, names...)
	current := first.Keyring().Current.KeyID
	for _, m := range c.nodes[1:] {
		if got := m.Keyring().Current.KeyID; got != current {
			t.Errorf("%s has key ID %s, the first node %s", m.name, got, current)
		}
	}

	t.Log("the etcd member that leads is killed")
	leader := c.leader(t)
	leader.Kill()
	// What etcd was writing may fail, and kube-apiserver says so; a client tries again.
	node.Eventually(t, time.Minute, "Secrets are written without the former leader", func() error { return second.put("without-a-member") })
	w = first.write("member")
	leader.Start(t)
	leader.WaitHealthy(t)
	w.end(t)

	t.Log("the third node is cut off")
	heal := network.Partition(t, 2)
	// Its member of etcd may have been the leader.
	node.Eventually(t, time.Minute, "Secrets are written without the third node", func() error { return first.put("meanwhile") })
	must(t, second.holds("meanwhile"))
	if code, body, err := third.Get("/readyz"); err != nil || code != 200 {
		t.Errorf("kleidi of the node that is cut off: %d %s %v", code, body, err)
	}
	heal()
	node.Eventually(t, time.Minute, "the third node reads what was written meanwhile", func() error { return third.holds("meanwhile") })

	t.Log("kleidi is killed on each node in turn")
	for _, m := range c.nodes {
		m.Serving.Kill()
		m.ServeOpen()
	}
	names = append(names, "without-a-member", "meanwhile")
	c.everywhere(t, names...)

	t.Log("all machines restart at once")
	for _, m := range c.nodes {
		m.api.Stop()
		m.Serving.Kill()
	}
	for _, e := range c.etcd {
		e.Kill()
	}
	for _, m := range c.nodes {
		m.Reboot(m.Kernel)
	}
	for _, e := range c.etcd {
		e.Start(t)
	}
	for _, m := range c.nodes {
		m.api.Launch(t)
	}
	for _, m := range c.nodes {
		m.ServeOpen()
	}
	for _, m := range c.nodes {
		m.api.WaitServing(t)
	}
	for _, m := range c.nodes {
		node.Eventually(t, 3*time.Minute, m.name+" reads all Secrets", func() error { return m.holds(names...) })
	}
}

// TestOtherBootDoesNotJoin: the machine is the approved one, but its boot is not.
func TestOtherBootDoesNotJoin(t *testing.T) {
	c := newControlPlane(t)
	first, second := c.nodes[0], c.nodes[1]
	first.ServeOpen()
	other := second.Kernel
	other.Kernel = "6.66-other"
	second.Reboot(other)
	var identity struct{ EK string }
	second.JSON(&identity, "node", "identity")
	policy := first.Path("policy.yaml")
	first.Run("bootpolicy", "record", "--file", policy)
	_, err := second.Try("join", joinCommand(t, first.Run("node", "approve", second.name, "--ek", identity.EK, "--boot-policy", policy))...)
	if err == nil || !strings.Contains(err.Error(), "boot policy") {
		t.Fatalf("a machine with another kernel joins: %v", err)
	}
	if _, err := os.Stat(second.Path("state/keyring.json")); err == nil {
		t.Error("it has a keyring")
	}
}
