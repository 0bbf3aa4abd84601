package ha

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// TestThreeNodes: two more nodes receive the first node's keyring, one of them while
// Secrets are written. Every node reads every Secret, whichever node wrote it, and
// whatever restarts or is cut off. All resources are encrypted but kleidi's own.
func TestThreeNodes(t *testing.T) {
	c := newControlPlane(t, "*.*")
	first, second, third := c.nodes[0], c.nodes[1], c.nodes[2]
	c.share(t)
	must(t, first.put("before"))

	t.Log("the second node joins while Secrets are written")
	w := first.write("joining")
	c.admit(t, first, second)
	second.ServeOpen()
	second.api.Start(t)
	w.end(t)
	t.Log("the third node joins")
	c.admit(t, second, third)
	third.ServeOpen()
	third.api.Start(t)
	c.consistent(t, c.nodes...)
	names := []string{"before", "joining-0"}
	for _, m := range c.nodes {
		must(t, m.put("by-"+m.name))
		names = append(names, "by-"+m.name)
	}
	c.everywhere(t, names...)
	for _, m := range c.nodes {
		_, page, err := m.Get("/metrics")
		must(t, err)
		for _, want := range []string{"kleidi_nodes 3", "kleidi_replica_up 1", "kleidi_fork 0", "kleidi_node_behind{node=\"" + m.name + "\"}", "kleidi_rotation_waiting{node=\"" + m.name + "\"} 0"} {
			if !strings.Contains(page, "\n"+want) {
				t.Errorf("%s: no %s in its metrics", m.name, want)
			}
		}
	}
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
	c.coldStart(t)
	for _, m := range c.nodes {
		node.Eventually(t, 3*time.Minute, m.name+" reads all Secrets", func() error { return m.holds(names...) })
	}
	c.consistent(t, c.nodes...)
}

// TestOtherBootDoesNotJoin: the machine is the approved one, but its boot is not.
func TestOtherBootDoesNotJoin(t *testing.T) {
	c := newControlPlane(t, "secrets")
	first, second := c.nodes[0], c.nodes[1]
	first.ServeOpen()
	other := second.Kernel
	other.Kernel = "6.66-other"
	second.Reboot(other)
	_, err := second.Try("join", c.approve(t, first, second)...)
	if err == nil || !strings.Contains(err.Error(), "boot policy") {
		t.Fatalf("a machine with another kernel joins: %v", err)
	}
	if _, err := os.Stat(second.Path("state/keyring.json")); err == nil {
		t.Error("it has a keyring")
	}
}
