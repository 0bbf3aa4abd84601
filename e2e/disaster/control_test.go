package disaster

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/threenodes"
)

type machine = threenodes.Machine

// controlPlane is three nodes over one etcd, with the files that its operator keeps
// apart.
type controlPlane struct {
	*threenodes.ControlPlane
	manual *manual
	usb    string   // a folder that survives everything
	names  []string // of the Secrets that must be readable
}

func newControlPlane(t *testing.T) *controlPlane {
	t.Helper()
	c := &controlPlane{manual: readManual(t), usb: t.TempDir(), ControlPlane: threenodes.Whole(t, "secrets")}
	identity, err := os.ReadFile(c.Nodes[0].Identity)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(c.usb, "kleidi-recovery.txt"), identity, 0o600))
	return c
}

var must = threenodes.Must

// put writes a Secret through a node. The Secret must be readable from then on.
func (c *controlPlane) put(t *testing.T, m *machine, name string) {
	t.Helper()
	m.PutSoon(t, name)
	c.names = append(c.names, name)
}

// reads demands that these Secrets can be read through these nodes. It restarts their
// kube-apiservers first, so that they remember no seed.
func (c *controlPlane) reads(t *testing.T, nodes []*machine, names ...string) {
	t.Helper()
	for _, m := range nodes {
		m.API.Kill()
	}
	c.StartAPIs(t, nodes...)
	threenodes.HoldSoon(t, nodes, names...)
}

// snapshot keeps a snapshot of etcd.
func (c *controlPlane) snapshot(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(c.usb, name)
	c.Etcd[0].Snapshot(t, path)
	return path
}

// stop kills every kube-apiserver and every member of etcd.
func (c *controlPlane) stop() {
	for _, m := range c.Nodes {
		if m.API.Process != nil {
			m.API.Kill()
		}
	}
	for _, e := range c.Etcd {
		e.Kill()
	}
}

// restore puts a snapshot into a new etcd of some members, as the document says, and
// starts the kube-apiservers of these nodes over it.
func (c *controlPlane) restore(t *testing.T, name string, members int, nodes ...*machine) {
	t.Helper()
	c.stop()
	c.Etcd = c.Members(members)
	for i, e := range c.Etcd {
		c.follow(t, c.Nodes[i], "restore etcd", 0, append(e.RestoreEnv(), "SNAPSHOT="+filepath.Join(c.usb, name))...)
		e.Start(c.T)
	}
	for _, e := range c.Etcd {
		e.WaitHealthy(t)
	}
	for _, m := range nodes {
		c.Connect(m)
	}
	c.StartAPIs(t, nodes...)
}
