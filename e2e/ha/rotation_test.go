package ha

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/threenodes"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
)

// whole starts a control plane of three nodes that have joined and are in step, and write.
func whole(t *testing.T) *controlPlane {
	t.Helper()
	c := &controlPlane{threenodes.Whole(t, "secrets")}
	for _, m := range c.Nodes {
		m.PutSoon(t, "ready-"+m.Name)
	}
	return c
}

// stagedID is the line of a result that names the KEK of a rotation.
var stagedID = regexp.MustCompile(`staged key ID +\S+`)

// TestRotation rotates the KEK of three nodes, with one fault after the other in each
// phase of a rotation.
func TestRotation(t *testing.T) {
	c := whole(t)
	c.record(t)
	names := []string{"before"}
	c.Nodes[0].PutSoon(t, "before")

	step := func(name string, f func(*testing.T)) {
		if !t.Failed() {
			t.Run(name, f)
		}
	}
	step("under load", func(t *testing.T) {
		l := c.load()
		former := c.Nodes[0].List().KeyID
		begin := time.Now()
		c.turn(t, c.Nodes[0])
		t.Logf("rotated in %s", time.Since(begin).Round(time.Millisecond))
		threenodes.InStep(t, c.Nodes...)
		if c.Nodes[0].List().KeyID == former {
			t.Error("the KEK is still the former one")
		}
		t.Log("kleidi is killed on each node during a rotation")
		for i, m := range c.Nodes {
			former := m.List().KeyID
			c.rotate(t, c.Nodes[0], m, phases[1+i], func() { l.kill(m) })
			m.ServeOpen()
			l.back(t, m)
			c.finish(t, c.Nodes[(i+1)%3], former, false)
		}
		l.end(t)
	})
	step("a machine is killed", func(t *testing.T) {
		aborted := 0
		for _, p := range phases {
			for i, m := range c.Nodes {
				next := c.Nodes[(i+1)%3]
				name := strings.ToLower(fmt.Sprintf("%s-%s", p.name, m.Name))
				t.Logf("kleidi and etcd of %s are killed in the phase %q", m.Name, p.name)
				c.Nodes[i].PutSoon(t, name)
				names = append(names, name)
				former := m.List().KeyID
				c.rotate(t, c.Nodes[0], next, p, func() {
					m.Serving.Kill()
					c.Etcd[i].Kill()
				})
				c.Etcd[i].Start(c.T)
				m.ServeOpen()
				if c.finish(t, next, former, i == 2) {
					aborted++
				}
			}
		}
		t.Logf("%d rotations were aborted in time", aborted)
		t.Log("a rotation is aborted while a node is away")
		node.Eventually(t, 10*time.Minute, "the last rotation is settled", func() error { // each node's record counts, also that of the one that is killed
			_, err := c.Nodes[0].Try("rotate", "--continue", "--wait", "--timeout", "20s")
			return err
		})
		former := c.Nodes[0].List().KeyID
		c.Nodes[2].Serving.Kill()
		c.rotate(t, c.Nodes[0], c.Nodes[1], phases[0], func() {})
		node.Eventually(t, 5*time.Minute, "the rotation is aborted", func() error {
			_, err := c.Nodes[0].Try("rotate", "--abort")
			if err != nil && (strings.Contains(err.Error(), "exit status 3") || strings.Contains(err.Error(), "no KEK is staged")) {
				return nil
			}
			return err
		})
		c.Nodes[2].ServeOpen()
		if !c.finish(t, c.Nodes[0], former, true) {
			t.Error("an aborted rotation has changed the KEK")
		}
		threenodes.HoldSoon(t, c.Nodes, names...)
	})
	step("a node is cut off", func(t *testing.T) {
		for i, p := range phases {
			cut := i % 3
			t.Logf("%s is cut off in the phase %q", c.Nodes[cut].Name, p.name)
			former := c.Nodes[cut].List().KeyID
			// A driver that is cut off waits for the API during this time.
			c.rotate(t, c.Nodes[i/2], c.Nodes[(cut+1)%3], p, func() {
				heal := threenodes.Network.Partition(t, cut)
				other := store(t, c.Nodes[(cut+1)%3])
				node.Eventually(t, 2*time.Minute, "the others read the cluster store", func() error {
					_, err := other.Load(t.Context())
					return err
				})
				heal()
			})
			c.finish(t, c.Nodes[(cut+2)%3], former, false)
		}
		threenodes.HoldSoon(t, c.Nodes, names...)
	})
	step("two operators", func(t *testing.T) {
		former := c.Nodes[0].List().KeyID
		errs, results := make([]error, 2), make([][]byte, 2)
		var both sync.WaitGroup
		for i := range errs {
			both.Go(func() { results[i], errs[i] = c.Nodes[i].Try("rotate") })
		}
		both.Wait()
		refused := 0
		for i, err := range errs {
			switch {
			case err != nil && (strings.Contains(err.Error(), "another rotation is going on") || strings.Contains(err.Error(), "meanwhile")):
				refused++
			case err != nil && !strings.Contains(err.Error(), "exit status 3"):
				t.Errorf("%s: %v", c.Nodes[i].Name, err)
			}
		}
		// The second may also have rotated after the first had ended.
		if id := stagedID.Find(results[0]); refused == 0 && id != nil && bytes.Equal(id, stagedID.Find(results[1])) {
			t.Errorf("both operators are told that they rotate:\n%s%s", results[0], results[1])
		}
		c.finish(t, c.Nodes[2], former, false)
	})
	step("etcd is restored", func(t *testing.T) { c.restoreEach(t) })
	step("a forged keyring", func(t *testing.T) { c.forge(t) })
	step("a node is removed", func(t *testing.T) { c.removeAndAdmit(t, names...) })
	step("all machines restart at once", func(t *testing.T) {
		c.turn(t, c.Nodes[0])
		c.coldStart(t)
		threenodes.InStep(t, c.Nodes...)
		threenodes.HoldSoon(t, c.Nodes, names...)
	})
}

// removeAndAdmit removes the third node while the others write Secrets. The removed node
// serves until it restarts. Then its machine is reset, and joins again.
func (c *controlPlane) removeAndAdmit(t *testing.T, names ...string) {
	t.Helper()
	stay, gone := &controlPlane{&threenodes.ControlPlane{T: c.T, Etcd: c.Etcd, Nodes: c.Nodes[:2]}}, c.Nodes[2]
	former := gone.List().KeyID
	l := stay.load()
	stay.Nodes[0].Run("node", "remove", gone.Name, "--yes", "--cut-off", "--wait", "--timeout", "10m")
	l.end(t)
	threenodes.InStep(t, stay.Nodes...)
	if stay.Nodes[0].List().KeyID == former {
		t.Error("the nodes that stay still use the KEK that the removed node knows")
	}
	threenodes.HoldSoon(t, []*machine{gone}, names...)
	gone.Serving.Kill()
	gone.Serve()
	node.Eventually(t, 2*time.Minute, "the removed node locks", func() error {
		if code, body, err := gone.Get("/readyz"); err != nil || code != http.StatusServiceUnavailable || !strings.Contains(body, "node-removed") {
			return fmt.Errorf("%d %s %w", code, body, err)
		}
		return nil
	})
	gone.Serving.Kill()
	gone.Run("reset", "--yes", gone.Name)
	c.admit(t, stay.Nodes[1], gone)
	gone.ServeOpen()
	threenodes.InStep(t, c.Nodes...)
	threenodes.HoldSoon(t, c.Nodes, names...)
}

// turn rotates the KEK, and waits until every node has followed.
func (c *controlPlane) turn(t *testing.T, by *machine) {
	t.Helper()
	if _, err := by.Try("rotate", "--wait", "--timeout", "10m"); err != nil {
		t.Fatal(err)
	}
}

// coldStart cuts the power of all machines at once, and starts them.
func (c *controlPlane) coldStart(t *testing.T) {
	t.Helper()
	for _, m := range c.Nodes {
		m.API.Kill()
		m.Serving.Kill()
	}
	for _, e := range c.Etcd {
		e.Kill()
	}
	for _, m := range c.Nodes {
		m.Reboot(m.Kernel)
	}
	for _, e := range c.Etcd {
		e.Start(c.T)
	}
	for _, m := range c.Nodes {
		m.API.Launch(c.T)
	}
	for _, m := range c.Nodes {
		m.ServeOpen()
	}
	for _, m := range c.Nodes {
		m.API.WaitServing(t)
	}
}

// restoreEach takes a snapshot of etcd in each phase of a rotation, and puts the
// snapshots back one after the other. Each time the nodes' keyring is newer, and returns
// to the store.
func (c *controlPlane) restoreEach(t *testing.T) {
	t.Helper()
	first, second, third := c.Nodes[0], c.Nodes[1], c.Nodes[2]
	former := seal.KeyID(first.List().KeyID)
	var restores []func()
	var names []string
	snapshot := func(p phase) {
		t.Helper()
		name := "snapshot-" + p.name
		first.PutSoon(t, name)
		names = append(names, name)
		c.until(t, first, former, p)
		restores = append(restores, cluster.Snapshot(t, c.Etcd))
	}
	second.Serving.Kill()
	third.Serving.Kill()
	if _, err := first.Try("rotate"); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Fatalf("a rotation without two nodes: %v", err)
	}
	snapshot(phases[0])
	second.ServeOpen()
	snapshot(phases[1])
	third.Serve()
	snapshot(phases[2])
	third.WaitOpen()
	snapshot(phases[3])
	c.finish(t, second, string(former), false)
	want := first.List()
	for i, restore := range restores {
		t.Logf("etcd is restored from the phase %q", phases[i].name)
		c.restore(t, restore)
		threenodes.InStep(t, c.Nodes...)
		c.stored(t)
		if now := first.List(); now.KeyID != want.KeyID || now.Revision < want.Revision {
			t.Errorf("the nodes went back from %+v to %+v", want, now)
		}
		threenodes.HoldSoon(t, c.Nodes, append(names[:i+1:i+1], "before")...)
	}
	c.turn(t, first)
}

// restore puts a snapshot back as an operator would: with every kube-apiserver stopped.
func (c *controlPlane) restore(t *testing.T, restore func()) {
	t.Helper()
	for _, m := range c.Nodes {
		m.API.Kill()
	}
	for _, e := range c.Etcd {
		e.Kill()
	}
	restore()
	for _, e := range c.Etcd {
		e.Start(c.T)
	}
	c.StartAPIs(t, c.Nodes...)
}

// forge puts keyrings of a former holder of the KEK into the cluster store: one under a
// KEK of the forger's own while the nodes still trust the KEK that the forger had, and
// one after they left that KEK. No node follows either.
func (c *controlPlane) forge(t *testing.T) {
	t.Helper()
	before := raw(t, c.Nodes[0])
	known := c.leak(t, before)
	defer known.Close()
	fresh, err := seal.Memory{}.NewKEK()
	must(t, err)
	staged, err := known.Stage(fresh, nil, time.Now())
	must(t, err)
	defer staged.Close()
	own, err := staged.Activate(time.Now())
	must(t, err)
	defer own.Close()
	c.refuse(t, before, own.Shared())

	t.Log("the nodes leave the KEK that is known")
	c.turn(t, c.Nodes[0])
	threenodes.InStep(t, c.Nodes...)
	later, err := known.AtLeast(known.Revision() + 1000)
	must(t, err)
	c.refuse(t, raw(t, c.Nodes[0]), later.Shared())
	again, err := own.AtLeast(own.Revision() + 2000)
	must(t, err)
	c.refuse(t, raw(t, c.Nodes[0]), again.Shared())
}

// leak opens a shared keyring with the recovery identity of the first node.
func (c *controlPlane) leak(t *testing.T, raw []byte) *keyring.Keyring {
	t.Helper()
	identity, err := os.ReadFile(c.Nodes[0].Identity)
	must(t, err)
	secret, err := seal.Memory{}.Take(identity)
	must(t, err)
	opener, err := recovery.NewOpener(seal.Memory{}, secret)
	must(t, err)
	u, err := keyring.Parse(raw)
	must(t, err)
	for _, s := range u.Slots() {
		if s.Type == seal.TypeRecovery {
			kek, err := opener.Unwrap(t.Context(), s)
			must(t, err)
			k, err := u.Open(kek, nil)
			must(t, err)
			return k
		}
	}
	t.Fatal("the shared keyring has no recovery slot")
	return nil
}

// refuse replaces the real keyring with a forged one. Each node reports that it is not in
// step, keeps its keyring, and serves.
func (c *controlPlane) refuse(t *testing.T, real, forged []byte) {
	t.Helper()
	want := c.Nodes[0].List()
	s := store(t, c.Nodes[0])
	swap(t, s, real, forged)
	for _, m := range c.Nodes {
		node.Eventually(t, 5*time.Minute, m.Name+" refuses the forged keyring", func() error {
			_, body, err := m.Get("/readyz")
			if err == nil && !strings.Contains(body, "cluster store: ") {
				err = errors.New("it seems to be in step: " + body)
			}
			return err
		})
		if now := m.List(); now.KeyID != want.KeyID || now.Revision != want.Revision {
			t.Errorf("%s follows the forged keyring: it has %+v, and had %+v", m.Name, now, want)
		}
		m.PutSoon(t, "forged-"+m.Name)
	}
	swap(t, s, forged, real)
	threenodes.InStep(t, c.Nodes...)
	c.stored(t)
}
