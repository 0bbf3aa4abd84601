// Package threenodes runs three control-plane nodes, each on a separate host with its own
// TPM, kleidi and kube-apiserver, over one etcd. The suites that make such nodes fail
// share it. It needs root.
package threenodes

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
)

// ControlPlane is three nodes over one etcd.
type ControlPlane struct {
	// T ends the servers.
	T     *testing.T
	Etcd  []*cluster.Etcd
	Nodes []*Machine

	accounts, encrypt string
	clients           cluster.ClientCA
}

// Machine is one node: kleidi and kube-apiserver on a host.
type Machine struct {
	*node.Node
	Name string
	Host cluster.Host
	API  *cluster.APIServer

	settings string
}

// New starts etcd, and prepares the nodes: the first has a keyring, and the others have
// none yet. encrypt names the resources that are encrypted.
func New(t *testing.T, encrypt string) *ControlPlane {
	t.Helper()
	c := &ControlPlane{T: t, encrypt: encrypt, accounts: filepath.Join(t.TempDir(), "accounts.pem")}
	c.clients = cluster.NewClientCA(t, t.TempDir())
	Must(t, os.WriteFile(c.accounts, cluster.ServiceAccountKey(t), 0o600))
	c.Etcd = c.Members(len(Network.Hosts))
	for _, e := range c.Etcd {
		e.Start(t)
	}
	for i := range Network.Hosts {
		c.Nodes = append(c.Nodes, c.Machine(i, i > 0))
	}
	for _, e := range c.Etcd {
		e.WaitHealthy(t)
	}
	return c
}

// Members prepares an etcd of some members, in new folders.
func (c *ControlPlane) Members(n int) []*cluster.Etcd {
	c.T.Helper()
	return cluster.NewMembers(Network.Hosts[:n], Binaries["etcd"], c.T.TempDir())
}

// Machine makes a node with a TPM of its own, for the present etcd.
func (c *ControlPlane) Machine(i int, uninitialised bool) *Machine {
	c.T.Helper()
	h := Network.Hosts[i]
	name := fmt.Sprint("cp-", i+1)
	m := &Machine{Name: name, Host: h, settings: fmt.Sprintf("node: %s\njoin:\n  listen: %s:9778\n", name, h.Address)}
	m.Node = node.Make(c.T, node.Setup{On: h.Command(), Settings: m.settings, Uninitialised: uninitialised})
	m.reachesStore(m.Path("admin.conf"))
	c.Connect(m)
	return m
}

// reachesStore configures the access to the cluster store.
func (m *Machine) reachesStore(kubeconfig string) {
	m.Configure(m.settings + "cluster:\n  kubeconfig: " + kubeconfig + "\n")
}

// Connect makes a machine's kube-apiserver, over the present etcd.
func (c *ControlPlane) Connect(m *Machine) {
	c.T.Helper()
	var urls []string
	for _, e := range c.Etcd {
		urls = append(urls, e.URL)
	}
	m.API = cluster.NewAPIServer(c.T, cluster.APIServerSetup{
		Binary: Binaries[apiserver], Host: m.Host, Dir: m.Dir(), Etcds: urls,
		EncryptionConfig: cluster.Patient(c.T, m.EncryptionConfig("--resources", c.encrypt)),
		ServiceAccounts:  c.accounts, Token: "e2e", ClientCA: c.clients.Certificate,
	})
	m.API.Kubeconfig(c.T)
}

// StartAPIs starts the kube-apiservers of these nodes side by side.
func (c *ControlPlane) StartAPIs(t *testing.T, nodes ...*Machine) {
	t.Helper()
	for _, m := range nodes {
		m.API.Launch(c.T)
	}
	for _, m := range nodes {
		m.API.WaitServing(t)
	}
}

// Share starts the first node, and makes it hand its keyring over to the cluster store. That
// node has the rights that kleidi cluster setup gives; the others use the administrator's
// kubeconfig.
func (c *ControlPlane) Share(t *testing.T) {
	t.Helper()
	first, second := c.Nodes[0], c.Nodes[1]
	first.Configure(first.settings) // cluster setup writes the file that is configured
	first.ServeOpen()
	first.API.Start(c.T)
	// A kube-controller-manager gives up if kube-apiserver is not healthy within 10 s.
	node.Eventually(t, 5*time.Minute, "kube-apiserver is healthy", func() error {
		_, err := first.API.Get("/healthz")
		return err
	})
	manager := cluster.StartControllerManager(c.T, first.Host, Binaries[controllerManager], first.Dir(), first.Path("admin.conf"), c.clients, 24*time.Hour)
	var access struct{ Kubeconfig string }
	node.Again(t, 10*time.Minute, "cluster setup", func() error {
		out, err := first.Try("cluster", "setup", "--kubeconfig", first.Path("admin.conf"), "-o", "json")
		if err != nil {
			return err
		}
		return json.Unmarshal(out, &access)
	}, node.SetUpAgain...)
	manager.Kill() // it has signed the certificate
	first.reachesStore(access.Kubeconfig)
	first.Approve(second.Name, second.Node, first.BootPolicy()) // writes format 2, which can be shared
	first.Serving.Kill()
	first.ServeOpen()
	node.Eventually(t, 5*time.Minute, "the cluster store holds the keyring", func() error {
		if list := first.List(); list.Commit != "cluster" {
			return fmt.Errorf("it is committed: %s", list.Commit)
		}
		return nil
	})
}

// Whole starts a control plane whose nodes have joined and are in step.
func Whole(t *testing.T, encrypt string) *ControlPlane {
	t.Helper()
	c := New(t, encrypt)
	c.Share(t)
	for _, m := range c.Nodes[1:] {
		c.Nodes[0].Admit(m.Name, m.Node)
		m.ServeOpen()
	}
	c.StartAPIs(t, c.Nodes[1:]...)
	InStep(t, c.Nodes...)
	return c
}

// List is the part of `kleidi node list -o json` that the tests read.
type List struct {
	Revision uint64
	KeyID    string
	Commit   string
	Nodes    []struct{ Node string }
}

// List returns the node's own view of the nodes.
func (m *Machine) List() (list List) {
	m.JSON(&list, "node", "list")
	return list
}

// InStep returns once these nodes have the same keyring, and it lists exactly them.
func InStep(t *testing.T, nodes ...*Machine) {
	t.Helper()
	node.Eventually(t, 5*time.Minute, "the nodes are in step", func() error {
		first := nodes[0].List()
		for _, m := range nodes {
			switch list := m.List(); {
			case list.KeyID != first.KeyID || list.Revision != first.Revision || list.Commit != "cluster":
				return fmt.Errorf("%s has revision %d, %s; %s has %d, %s (%s)", nodes[0].Name, first.Revision, first.KeyID, m.Name, list.Revision, list.KeyID, list.Commit)
			case len(list.Nodes) != len(nodes):
				return fmt.Errorf("%s lists %+v", m.Name, list.Nodes)
			}
			if code, body, err := m.Get("/readyz"); err != nil || code != 200 || strings.Contains(body, "cluster store: ") {
				return fmt.Errorf("%s: %d %s %w", m.Name, code, body, err)
			}
		}
		return nil
	})
}

// Put writes a Secret through a node.
func (m *Machine) Put(name string) error {
	return m.API.Put("secrets", name, map[string]string{"password": "plaintext of " + name})
}

// Holds returns an error unless the node reads these Secrets as Put wrote them.
func (m *Machine) Holds(names ...string) error {
	for _, name := range names {
		got, err := m.API.Secret(name)
		if err != nil {
			return fmt.Errorf("%s: read Secret %s: %w", m.Name, name, err)
		}
		if got["password"] != "plaintext of "+name {
			return &WrongValue{m.Name, name, got["password"]}
		}
	}
	return nil
}

// WrongValue says that a Secret has another value than the test wrote.
type WrongValue struct{ Node, Secret, Value string }

func (w *WrongValue) Error() string {
	return fmt.Sprintf("%s: Secret %s reads %q", w.Node, w.Secret, w.Value)
}

// PutSoon writes a Secret through a node. It tries again, as a client does while a member
// of etcd becomes the leader.
func (m *Machine) PutSoon(t *testing.T, name string) {
	t.Helper()
	node.Eventually(t, 5*time.Minute, m.Name+" writes "+name, func() error { return m.Put(name) })
}

// HoldSoon demands that each of these nodes soon reads each of these Secrets.
func HoldSoon(t *testing.T, nodes []*Machine, names ...string) {
	t.Helper()
	for _, m := range nodes {
		node.Eventually(t, 5*time.Minute, m.Name+" reads all Secrets", func() error {
			err := m.Holds(names...)
			if wrong := (*WrongValue)(nil); errors.As(err, &wrong) {
				t.Fatal(err)
			}
			return err
		})
	}
}

// Must ends a test at an error.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
