package kill

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/seal/store/kube/kubetest"
)

// several is three nodes that share a cluster store. The store is the part of an API that
// kleidi uses; e2e/ha has real ones. seen is what each node's kube-apiserver was told.
type several struct {
	t     *testing.T
	nodes []*machine
	serve []*traced
	seen  []*history
}

func newSeveral(t *testing.T, port int) *several {
	t.Helper()
	api, err := kubetest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(api.Stop)
	c := &several{t: t, serve: make([]*traced, 3)}
	for i, name := range []string{"one", "two", "three"} {
		m := newMachine(t)
		m.name = name
		m.write("kubeconfig", string(api.Kubeconfig()))
		listen := "join: {listen: " + loopback(port+i) + "}\n"
		if m.configure(listen); i > 0 {
			m.configure(listen + "cluster: {kubeconfig: " + m.path("kubeconfig") + "}\n")
		}
		m.Reboot(usual)
		c.nodes, c.seen = append(c.nodes, m), append(c.seen, newHistory())
	}
	first := c.nodes[0]
	first.run("init --recovery-recipient " + first.identity())
	first.run("bootpolicy record --file DIR/policy.yaml")
	stop := first.background()
	first.run(approveTwo) // writes format 2, which can be shared
	stop()
	first.configure(first.more + "cluster: {kubeconfig: " + first.path("kubeconfig") + "}\n")
	c.start(0, false)
	for i := range c.nodes[1:] {
		c.admit(i + 1)
	}
	c.inStep()
	return c
}

// admit has a machine join, and starts its serve.
func (c *several) admit(i int) {
	c.t.Helper()
	m := c.nodes[i]
	ek := m.ek()
	eventually(c.t, m.name+" joins", func() error {
		_, err := m.try(c.nodes[0].approves(m.name, ek, c.nodes[0].path("policy.yaml")))
		return err
	})
	c.start(i, false)
}

// start starts a node's serve, and counts its steps if it is the next victim. Everything
// that the node's kube-apiserver holds must decrypt.
func (c *several) start(i int, victims bool) {
	c.t.Helper()
	m := c.nodes[i]
	if victims {
		c.serve[i] = trace(c.t, m.stateDir(), m.path("serve.log"), victim{}, m.command("serve"))
	} else {
		c.serve[i] = release(c.t, m.path("serve.log"), m.command("serve"))
	}
	client := m.client(c.seen[i])
	defer client.conn.Close()
	m.waitOpen(client, c.serve[i])
}

// end ends a node's serve.
func (c *several) end(i int) {
	c.serve[i].signal(unix.SIGTERM)
	c.serve[i].wait()
}

// inStep returns once all nodes have the same keyring, and all of them announce its KEK.
func (c *several) inStep() {
	c.t.Helper()
	type list struct {
		Revision uint64
		KeyID    string
		Commit   string
		Nodes    []struct{ Node string }
	}
	eventually(c.t, "the nodes are in step", func() error {
		all := make([]list, len(c.nodes))
		for i, m := range c.nodes {
			out, err := m.try("node list -o json")
			if err == nil {
				err = json.Unmarshal(out, &all[i])
			}
			if err != nil {
				return err
			}
			if all[i].Revision != all[0].Revision || all[i].KeyID != all[0].KeyID || all[i].Commit != "cluster" || len(all[i].Nodes) != len(c.nodes) {
				return fmt.Errorf("%+v", all)
			}
		}
		return nil
	})
	for i, m := range c.nodes {
		client := m.client(c.seen[i])
		defer client.conn.Close()
		m.waitOpen(client, c.serve[i])
	}
}

// killed runs a verb on the first node, and kills a node's serve before a step that gives,
// changes or removes a file's name. It reports whether the verb came to that step. What a
// kill between these steps leaves is not seen by the next start, as TestServeKilled shows.
// The verb ends with the serve that was killed: it would wait for that node.
func (c *several) killed(verb string, i, step int) bool {
	c.t.Helper()
	p := c.serve[i]
	client := c.nodes[i].client(c.seen[i])
	defer client.conn.Close()
	p.arm(victim{inName, step})
	stop := client.pollUntil(c.t.Context(), p)
	ctx, cancel := context.WithCancel(c.t.Context())
	defer cancel()
	go func() {
		defer cancel()
		select {
		case <-p.done:
		case <-ctx.Done():
		}
	}()
	_, err := c.nodes[0].tryUntil(ctx, verb)
	stop()
	steps, killed := p.reached()
	if p.arm(victim{}); !killed {
		if err != nil {
			c.t.Fatalf("%s: %v", verb, err)
		}
		return false
	}
	p.wait()
	if c.nodes[i].run("keyring verify"); c.t.Failed() {
		c.t.Fatalf("node %s was killed after %s", c.nodes[i].name, trail(steps))
	}
	return true
}

// again runs a verb on a node until it succeeds: another node may change the keyring
// meanwhile. over is the verb's message that nothing is left to do.
func (c *several) again(i int, verb, over string) {
	c.t.Helper()
	eventually(c.t, verb, func() error {
		_, err := c.nodes[i].try(verb)
		if err != nil && over != "" && strings.Contains(err.Error(), over) {
			return nil
		}
		return err
	})
}

// TestSeveralRotateKilled kills the serve that drives a rotation of three nodes, and then
// that of another node, before each (of the other one: each second) step that changes the
// name of a file. Afterwards the keyring opens on every
// node, and the rotation is finished, or aborted and made again.
func TestSeveralRotateKilled(t *testing.T) {
	t.Parallel()
	c := newSeveral(t, 9790)
	for i, who := range []string{"that drives", "that follows"} {
		kills := 0
		c.end(i)
		c.start(i, true)
		step := 1
		for ; c.killed("rotate --wait --timeout 10m", i, step); step += 1 + i {
			kills++
			c.start(i, true)
			if kills%3 == 0 {
				c.again(1, "rotate --abort", "no KEK is staged")
			}
			c.again(1+kills%2, "rotate --continue --wait --timeout 10m", "")
			c.inStep()
		}
		c.end(i)
		c.start(i, false)
		if t.Logf("the node %s was killed %d times", who, kills); kills < 6 {
			t.Error("too few steps; are system calls still recognised?")
		}
	}
}

// TestSeveralRemoveKilled kills the serve that removes a node of three before each second such
// step. Afterwards the removal is finished from the other node that stays, and the
// removed machine joins again.
func TestSeveralRemoveKilled(t *testing.T) {
	t.Parallel()
	c := newSeveral(t, 9793)
	c.end(0)
	c.start(0, true)
	const remove = "node remove three --yes --cut-off --wait --timeout 10m"
	kills := 0
	for killed := true; killed; kills++ {
		if killed = c.killed(remove, 0, 1+2*kills); killed {
			c.start(0, true)
			c.again(1, remove, "no removed node of that name knows its current KEK")
		}
		c.end(2)
		c.nodes[2].run("reset --yes three")
		c.admit(2)
		c.inStep()
	}
	if t.Logf("the node was killed %d times", kills-1); kills < 6 {
		t.Error("too few steps; are system calls still recognised?")
	}
}
