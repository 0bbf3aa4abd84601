package disaster

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/threenodes"
)

// TestDisasters follows the document through one loss after the other. Each loss begins
// with the state that the one before has left.
func TestDisasters(t *testing.T) {
	c := newControlPlane(t)
	for _, step := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"backups", c.backups},
		{"a snapshot older than a rotation", c.olderThanRotation},
		{"a snapshot older than a removal", c.olderThanRemoval},
		{"a snapshot older than a prune", c.olderThanPrune},
		{"a keyring is lost while kube-apiserver runs", c.keyringLost},
		{"all nodes are lost but one", c.allButOne},
		{"the whole cluster on other hardware", func(t *testing.T) {
			for _, m := range c.Nodes { // the copy of any node will do
				c.follow(t, m, "back up", 0)
			}
			c.otherHardware(t)
		}},
		{"only etcd's snapshot and the identity are left", func(t *testing.T) {
			copies, err := filepath.Glob(filepath.Join(c.usb, "keyring-*.json"))
			must(t, err)
			for _, path := range copies {
				must(t, os.Remove(path))
			}
			c.otherHardware(t)
		}},
	} {
		if !t.Failed() {
			t.Run(step.name, step.run)
		}
	}
	if !t.Failed() {
		c.manual.allRan(t)
	}
}

func (c *controlPlane) backups(t *testing.T) {
	first := c.Nodes[0]
	c.put(t, first, "first")
	c.snapshot(t, "early.db")
	c.follow(t, first, "back up", 0)
	if out := c.follow(t, first, "check", 0, "SNAPSHOT="+filepath.Join(c.usb, "early.db")); !strings.Contains(out, "the keyring holds every key ID") {
		t.Error(out)
	}
}

// rotate rotates the KEK, and waits until each node's kube-apiserver encrypts under the
// fresh one.
func (c *controlPlane) rotate(t *testing.T) {
	t.Helper()
	c.Nodes[0].Run("rotate", "--wait", "--timeout", "10m")
	threenodes.InStep(t, c.Nodes...)
}

func (c *controlPlane) olderThanRotation(t *testing.T) {
	first := c.Nodes[0]
	c.rotate(t)
	rotated := first.List().KeyID
	c.snapshot(t, "rotated.db")
	if out := c.follow(t, first, "check", 0, "SNAPSHOT="+filepath.Join(c.usb, "early.db")); !strings.Contains(out, "retired") {
		t.Error(out)
	}
	c.restore(t, "early.db", 3, c.Nodes...)
	threenodes.InStep(t, c.Nodes...)
	if now := first.List().KeyID; now != rotated {
		t.Errorf("the nodes went back to %s", now)
	}
	c.reads(t, c.Nodes, c.names...)
	c.put(t, first, "second")
	c.snapshot(t, "three-nodes.db")
}

func (c *controlPlane) olderThanRemoval(t *testing.T) {
	stay, gone := c.Nodes[:2], c.Nodes[2]
	threenodes.InStep(t, c.Nodes...) // their kube-apiservers have just been restarted
	stay[0].Run("node", "remove", gone.Name, "--yes", "--cut-off", "--wait", "--timeout", "10m")
	gone.Serving.Kill()
	c.restore(t, "three-nodes.db", 3, stay...)
	threenodes.InStep(t, stay...)
	c.follow(t, stay[0], "after a removal", 0)
	c.reads(t, stay, c.names...)

	gone.Run("reset", "--yes", gone.Name)
	stay[0].Admit(gone.Name, gone.Node)
	gone.ServeOpen()
	c.Connect(gone)
	gone.API.Start(c.T)
	threenodes.InStep(t, c.Nodes...)
	c.reads(t, c.Nodes, c.names...)
}

func (c *controlPlane) olderThanPrune(t *testing.T) {
	first := c.Nodes[0]
	oldest := c.keyIDs(t, "early.db")[0]
	node.Eventually(t, 5*time.Minute, "the Secrets are rewritten", first.API.Rewrite)
	var urls []string
	for _, e := range c.Etcd {
		urls = append(urls, e.URL)
	}
	archive := filepath.Join(c.usb, "kleidi-archive.json")
	threenodes.InStep(t, c.Nodes...) // their kube-apiservers have just been restarted
	// It waits 5 s for the records of all nodes.
	node.Again(t, 5*time.Minute, "the KEK is pruned", func() error {
		_, err := first.Try("prune", oldest, "--etcd", strings.Join(urls, ","), "--yes", "--archive", archive)
		return err
	}, "not every node is known to encrypt")
	threenodes.InStep(t, c.Nodes...)
	c.reads(t, c.Nodes, c.names...)
	c.snapshot(t, "pruned.db")

	out := c.follow(t, first, "check", 4, "SNAPSHOT="+filepath.Join(c.usb, "early.db"))
	if want := "kleidi keyring import-archive " + oldest + " and the recovery identity"; !strings.Contains(out, want) {
		t.Errorf("no %q: %s", want, out)
	}
	c.follow(t, first, "check with an archive", 4, "SNAPSHOT="+filepath.Join(c.usb, "early.db"))
	c.restore(t, "early.db", 3, c.Nodes...)
	if _, err := first.API.Secret("first"); err == nil {
		t.Error("a Secret under the pruned KEK reads")
	}
	c.follow(t, first, "import an archive", 0)
	threenodes.InStep(t, c.Nodes...)
	c.reads(t, c.Nodes, "first")
	c.restore(t, "pruned.db", 3, c.Nodes...)
	threenodes.InStep(t, c.Nodes...)
	c.reads(t, c.Nodes, c.names...)
}

func (c *controlPlane) keyringLost(t *testing.T) {
	first, second := c.Nodes[0], c.Nodes[1]
	must(t, os.Remove(first.Path("state/keyring.json")))
	c.follow(t, first, "save", 0)
	first.Serving.Kill()
	first.ServeOpen()
	c.reads(t, c.Nodes, c.names...)

	t.Log("kleidi serve was restarted before anybody noticed")
	must(t, errors.Join(os.Remove(first.Path("state/keyring.json")), os.Remove(first.Path("state/keyring.json.previous"))))
	first.Serving.Kill()
	first.Serve()
	first.Serving.Kill()
	second.Admit(first.Name, first.Node)
	first.ServeOpen()
	threenodes.InStep(t, c.Nodes...)
	c.reads(t, c.Nodes, c.names...)
}

func (c *controlPlane) allButOne(t *testing.T) {
	left := c.Nodes[0]
	c.stop()
	for _, m := range c.Nodes[1:] {
		m.Serving.Kill()
	}
	db := filepath.Join(c.Etcd[0].Data(), "member/snap/db")
	c.Etcd = c.Members(1)
	c.follow(t, left, "restore etcd from a member", 0, append(c.Etcd[0].RestoreEnv(), "DB="+db)...)
	c.Etcd[0].Start(c.T)
	c.Etcd[0].WaitHealthy(t)
	c.Connect(left)
	left.API.Start(c.T)
	c.reads(t, c.Nodes[:1], c.names...)
	readsStore(t, left)
	former := left.List().KeyID
	c.follow(t, left, "remove the lost nodes", 0)
	if now := left.List(); now.KeyID == former || len(now.Nodes) != 1 {
		t.Errorf("after the removal: %+v", now)
	}
	c.put(t, left, "alone")
	c.replace(t, 1, 2)
}

// readsStore waits until a node reads the cluster store again. kube-apiserver serves an
// administrator before it has read the roles, and refuses the node's own user meanwhile.
func readsStore(t *testing.T, m *machine) {
	t.Helper()
	node.Eventually(t, 5*time.Minute, m.Name+" reads the cluster store", func() error {
		code, body, err := m.Get("/readyz")
		if err == nil && (code != http.StatusOK || strings.Contains(body, "cluster store: ")) {
			err = fmt.Errorf("%d %s", code, body)
		}
		return err
	})
}

// replace puts new machines in the places of lost ones.
func (c *controlPlane) replace(t *testing.T, lost ...int) {
	t.Helper()
	for _, i := range lost {
		m := c.Machine(i, true)
		c.Nodes[i] = m
		c.Nodes[0].Admit(m.Name, m.Node)
		m.ServeOpen()
		m.API.Start(c.T)
	}
	threenodes.InStep(t, c.Nodes...)
	c.reads(t, c.Nodes, c.names...)
}

// otherHardware loses every machine.
func (c *controlPlane) otherHardware(t *testing.T) {
	_ = os.Remove(filepath.Join(c.usb, "last.db"))
	snapshot := "SNAPSHOT=" + c.snapshot(t, "last.db")
	keyID := c.Nodes[0].List().KeyID
	c.stop()
	for _, m := range c.Nodes {
		m.Serving.Kill()
	}
	first := c.Machine(0, true)
	c.Nodes[0] = first
	if copies, _ := filepath.Glob(filepath.Join(c.usb, "keyring-*.json")); len(copies) == 0 {
		c.follow(t, first, "take the keyring of the snapshot", 0, snapshot)
	}
	c.follow(t, first, "restore the keyring", 0, "KEY_ID="+keyID)
	first.ServeOpen()
	c.restore(t, "last.db", 3, first)
	c.reads(t, c.Nodes[:1], c.names...)
	c.follow(t, first, "remove the lost nodes", 0)
	c.replace(t, 1, 2)
	c.rotate(t)
	c.put(t, first, fmt.Sprint("under-", len(c.names)))
	c.reads(t, c.Nodes, c.names...)
}

// keyIDs returns the key IDs of a snapshot.
func (c *controlPlane) keyIDs(t *testing.T, name string) (all []string) {
	t.Helper()
	var result struct {
		Snapshots []struct{ KeyIDs []struct{ KeyID string } }
	}
	c.Nodes[0].JSON(&result, "keyring", "check", "--snapshot", filepath.Join(c.usb, name))
	for _, k := range result.Snapshots[0].KeyIDs {
		all = append(all, k.KeyID)
	}
	return all
}
