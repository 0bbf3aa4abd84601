package ha

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
)

// whole starts a control plane whose three nodes have joined and are in step.
func whole(t *testing.T) *controlPlane {
	t.Helper()
	c := newControlPlane(t, "secrets")
	c.share(t)
	for _, m := range c.nodes[1:] {
		c.admit(t, c.nodes[0], m)
		m.ServeOpen()
		m.api.Launch(c.t)
	}
	for _, m := range c.nodes[1:] {
		m.api.WaitServing(t)
	}
	for _, m := range c.nodes {
		node.Eventually(t, time.Minute, m.name+" writes", func() error { return m.put("ready-" + m.name) })
	}
	c.consistent(t, c.nodes...)
	return c
}

// TestRotation rotates the KEK of three nodes, with one fault after the other in each
// phase of a rotation.
func TestRotation(t *testing.T) {
	c := whole(t)
	c.record(t)
	names := []string{"before"}
	must(t, c.nodes[0].put("before"))

	step := func(name string, f func(*testing.T)) {
		if !t.Failed() {
			t.Run(name, f)
		}
	}
	step("under load", func(t *testing.T) {
		l := c.load()
		former := c.nodes[0].list(t).KeyID
		begin := time.Now()
		c.turn(t, c.nodes[0])
		t.Logf("rotated in %s", time.Since(begin).Round(time.Millisecond))
		c.consistent(t, c.nodes...)
		if c.nodes[0].list(t).KeyID == former {
			t.Error("the KEK is still the former one")
		}
		t.Log("kleidi is killed on each node during a rotation")
		for i, m := range c.nodes {
			former := m.list(t).KeyID
			c.rotate(t, c.nodes[0], m, phases[1+i], func() { m.Serving.Kill() })
			m.ServeOpen()
			c.finish(t, c.nodes[(i+1)%3], former, false)
		}
		l.end(t)
	})
	step("a machine is killed", func(t *testing.T) {
		for _, p := range phases {
			for i, m := range c.nodes {
				next := c.nodes[(i+1)%3]
				name := strings.ToLower(fmt.Sprintf("%s-%s", p.name, m.name))
				t.Logf("kleidi and etcd of %s are killed in the phase %q", m.name, p.name)
				must(t, c.nodes[i].eventually(t, name))
				names = append(names, name)
				former := m.list(t).KeyID
				c.rotate(t, c.nodes[0], next, p, func() {
					m.Serving.Kill()
					c.etcd[i].Kill()
				})
				c.etcd[i].Start(c.t)
				m.ServeOpen()
				c.finish(t, next, former, i == 2)
			}
		}
		c.readEverywhere(t, names...)
	})
	step("a node is cut off", func(t *testing.T) {
		for i, p := range phases {
			cut := i % 3
			t.Logf("%s is cut off in the phase %q", c.nodes[cut].name, p.name)
			former := c.nodes[cut].list(t).KeyID
			// A driver that is cut off waits for the API meanwhile.
			c.rotate(t, c.nodes[i/2], c.nodes[(cut+1)%3], p, func() {
				heal := network.Partition(t, cut)
				other := c.nodes[(cut+1)%3].store(t)
				node.Eventually(t, 2*time.Minute, "the others read the cluster store", func() error {
					_, err := other.Load(t.Context())
					return err
				})
				heal()
			})
			c.finish(t, c.nodes[(cut+2)%3], former, false)
		}
		c.readEverywhere(t, names...)
	})
	step("two operators", func(t *testing.T) {
		former := c.nodes[0].list(t).KeyID
		errs := make([]error, 2)
		var both sync.WaitGroup
		for i := range errs {
			both.Go(func() { _, errs[i] = c.nodes[i].Try("rotate") })
		}
		both.Wait()
		for i, err := range errs {
			if err != nil && !strings.Contains(err.Error(), "exit status 3") && !strings.Contains(err.Error(), "another rotation is going on") && !strings.Contains(err.Error(), "meanwhile") {
				t.Errorf("%s: %v", c.nodes[i].name, err)
			}
		}
		c.finish(t, c.nodes[2], former, false)
	})
	step("etcd is restored", func(t *testing.T) { c.restoreEach(t) })
	step("a forged keyring", func(t *testing.T) { c.forge(t) })
	step("a node is removed", func(t *testing.T) { c.removeAndAdmit(t, names...) })
	step("all machines restart at once", func(t *testing.T) {
		c.turn(t, c.nodes[0])
		c.coldStart(t)
		c.consistent(t, c.nodes...)
		c.readEverywhere(t, names...)
	})
}

// removeAndAdmit removes the third node while the others write Secrets. The removed node
// serves until it restarts. Then its machine forgets what it knew, and joins again.
func (c *controlPlane) removeAndAdmit(t *testing.T, names ...string) {
	t.Helper()
	stay, gone := &controlPlane{etcd: c.etcd, nodes: c.nodes[:2]}, c.nodes[2]
	former := gone.list(t).KeyID
	l := stay.load()
	stay.nodes[0].Run("node", "remove", gone.name, "--yes", "--cut-off", "--wait", "--timeout", "60s")
	l.end(t)
	stay.consistent(t, stay.nodes...)
	if stay.nodes[0].list(t).KeyID == former {
		t.Error("the nodes that stay still use the KEK that the removed node knows")
	}
	must(t, gone.holds(names...))
	gone.Serving.Kill()
	gone.Serve()
	node.Eventually(t, time.Minute, "the removed node locks", func() error {
		if code, body, err := gone.Get("/readyz"); err != nil || code != http.StatusServiceUnavailable || !strings.Contains(body, "node-removed") {
			return fmt.Errorf("%d %s %w", code, body, err)
		}
		return nil
	})
	gone.Serving.Kill()
	gone.Run("reset", "--yes", gone.name)
	c.admit(t, stay.nodes[1], gone)
	gone.ServeOpen()
	c.consistent(t, c.nodes...)
	c.readEverywhere(t, names...)
}

// turn rotates the KEK, and waits until every node has.
func (c *controlPlane) turn(t *testing.T, by *machine) {
	t.Helper()
	if _, err := by.Try("rotate", "--wait", "--timeout", "60s"); err != nil {
		t.Fatal(err)
	}
}

// eventually writes a Secret through a node. A client tries again while a member of etcd
// is replaced as the leader.
func (m *machine) eventually(t *testing.T, name string) error {
	t.Helper()
	node.Eventually(t, 2*time.Minute, m.name+" writes "+name, func() error { return m.put(name) })
	return nil
}

// readEverywhere checks that each of these Secrets reads through each node, at the latest
// once kube-apiserver has found the etcd member that leads.
func (c *controlPlane) readEverywhere(t *testing.T, names ...string) {
	t.Helper()
	for _, m := range c.nodes {
		node.Eventually(t, 2*time.Minute, m.name+" reads all Secrets", func() error { return m.holds(names...) })
	}
}

// coldStart cuts the power of all machines at once, and starts them.
func (c *controlPlane) coldStart(t *testing.T) {
	t.Helper()
	for _, m := range c.nodes {
		m.api.Kill()
		m.Serving.Kill()
	}
	for _, e := range c.etcd {
		e.Kill()
	}
	for _, m := range c.nodes {
		m.Reboot(m.Kernel)
	}
	for _, e := range c.etcd {
		e.Start(c.t)
	}
	for _, m := range c.nodes {
		m.api.Launch(c.t)
	}
	for _, m := range c.nodes {
		m.ServeOpen()
	}
	for _, m := range c.nodes {
		m.api.WaitServing(t)
	}
}

// restoreEach takes a snapshot of etcd in each phase of a rotation, and puts them back
// one after the other. The nodes' keyring is newer each time, and comes back.
func (c *controlPlane) restoreEach(t *testing.T) {
	t.Helper()
	first, second, third := c.nodes[0], c.nodes[1], c.nodes[2]
	former := seal.KeyID(first.list(t).KeyID)
	var restores []func()
	var names []string
	snapshot := func(p phase) {
		t.Helper()
		name := "snapshot-" + p.name
		must(t, first.eventually(t, name))
		names = append(names, name)
		c.until(t, first, former, p)
		restores = append(restores, cluster.Snapshot(t, c.etcd))
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
	want := first.list(t)
	for i, restore := range restores {
		t.Logf("etcd is restored from the phase %q", phases[i].name)
		c.restore(t, restore)
		c.consistent(t, c.nodes...)
		c.stored(t)
		if now := first.list(t); now.KeyID != want.KeyID || now.Revision < want.Revision {
			t.Errorf("the nodes went back from %+v to %+v", want, now)
		}
		c.readEverywhere(t, append(names[:i+1:i+1], "before")...)
	}
	c.turn(t, first)
}

// restore puts a snapshot back as an operator would: with every kube-apiserver stopped.
func (c *controlPlane) restore(t *testing.T, restore func()) {
	t.Helper()
	for _, m := range c.nodes {
		m.api.Kill()
	}
	for _, e := range c.etcd {
		e.Kill()
	}
	restore()
	for _, e := range c.etcd {
		e.Start(c.t)
	}
	for _, m := range c.nodes {
		m.api.Launch(c.t)
	}
	for _, m := range c.nodes {
		m.api.WaitServing(t)
	}
}

// forge puts keyrings into the cluster store that somebody made who had the KEK: one
// with a KEK of its own while the nodes trust the KEK that it had, and one after they
// left that one. No node follows either.
func (c *controlPlane) forge(t *testing.T) {
	t.Helper()
	before := c.nodes[0].raw(t)
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
	c.turn(t, c.nodes[0])
	c.consistent(t, c.nodes...)
	later, err := known.AtLeast(known.Revision() + 1000)
	must(t, err)
	c.refuse(t, c.nodes[0].raw(t), later.Shared())
	again, err := own.AtLeast(own.Revision() + 2000)
	must(t, err)
	c.refuse(t, c.nodes[0].raw(t), again.Shared())
}

// leak opens a shared keyring with the recovery identity of the first node.
func (c *controlPlane) leak(t *testing.T, raw []byte) *keyring.Keyring {
	t.Helper()
	identity, err := os.ReadFile(c.nodes[0].Identity)
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

// refuse puts a forged keyring in the place of the real one. Each node says that it is
// not in step, keeps its keyring, and serves.
func (c *controlPlane) refuse(t *testing.T, real, forged []byte) {
	t.Helper()
	want := c.nodes[0].list(t)
	s := c.nodes[0].store(t)
	must(t, s.Swap(t.Context(), real, forged))
	for _, m := range c.nodes {
		node.Eventually(t, time.Minute, m.name+" refuses the forged keyring", func() error {
			_, body, err := m.Get("/readyz")
			if err == nil && !strings.Contains(body, "cluster store: ") {
				err = errors.New("it seems to be in step: " + body)
			}
			return err
		})
		if now := m.list(t); now.KeyID != want.KeyID || now.Revision != want.Revision {
			t.Errorf("%s follows the forged keyring: it has %+v, and had %+v", m.name, now, want)
		}
		must(t, m.eventually(t, "forged-"+m.name))
	}
	must(t, s.Swap(t.Context(), forged, real))
	c.consistent(t, c.nodes...)
	c.stored(t)
}
