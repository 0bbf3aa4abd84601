package ha

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/threenodes"
)

// TestThreeNodes: two more nodes receive the first node's keyring, one of them while
// Secrets are written. Every node reads every Secret, whichever node wrote it, and
// whatever restarts or is cut off. All resources except kleidi's own are encrypted.
func TestThreeNodes(t *testing.T) {
	c := newControlPlane(t, "*.*")
	first, second, third := c.Nodes[0], c.Nodes[1], c.Nodes[2]
	c.Share(t)
	first.PutSoon(t, "before")

	t.Log("the second node joins while Secrets are written")
	w := write(first, "joining")
	c.admit(t, first, second)
	second.ServeOpen()
	second.API.Start(t)
	w.end(t)
	t.Log("the third node joins")
	c.admit(t, second, third)
	third.ServeOpen()
	third.API.Start(t)
	threenodes.InStep(t, c.Nodes...)
	names := []string{"before", "joining-0"}
	for _, m := range c.Nodes {
		m.PutSoon(t, "by-"+m.Name)
		names = append(names, "by-"+m.Name)
	}
	c.everywhere(t, names...)
	for _, m := range c.Nodes {
		// A node reports the others' records as it last read them.
		node.Eventually(t, 5*time.Minute, m.Name+"'s metrics show three nodes in step", func() error {
			_, page, err := m.Get("/metrics")
			if err != nil {
				return err
			}
			for _, want := range []string{"kleidi_nodes 3", "kleidi_replica_up 1", "kleidi_fork 0", "kleidi_node_behind{node=\"" + m.Name + "\"} 0", "kleidi_rotation_waiting{node=\"" + m.Name + "\"} 0"} {
				if !strings.Contains(page, "\n"+want+"\n") {
					return fmt.Errorf("no %s", want)
				}
			}
			return nil
		})
	}
	current := first.Keyring().Current.KeyID
	for _, m := range c.Nodes[1:] {
		if got := m.Keyring().Current.KeyID; got != current {
			t.Errorf("%s has key ID %s, the first node %s", m.Name, got, current)
		}
	}

	t.Log("the etcd member that leads is killed")
	leader := c.leader(t)
	leader.Kill()
	// etcd's write in progress may fail, and kube-apiserver reports that; a client tries
	// again.
	node.Eventually(t, 5*time.Minute, "Secrets are written without the former leader", func() error { return second.Put("without-a-member") })
	w = write(first, "member")
	leader.Start(t)
	leader.WaitHealthy(t)
	w.end(t)

	t.Log("the third node is cut off")
	heal := threenodes.Network.Partition(t, 2)
	// Its member of etcd may have been the leader.
	node.Eventually(t, 5*time.Minute, "Secrets are written without the third node", func() error { return first.Put("meanwhile") })
	threenodes.HoldSoon(t, []*machine{second}, "meanwhile")
	if code, body, err := third.Get("/readyz"); err != nil || code != 200 {
		t.Errorf("kleidi of the node that is cut off: %d %s %v", code, body, err)
	}
	heal()
	node.Eventually(t, 5*time.Minute, "the third node reads what was written meanwhile", func() error { return third.Holds("meanwhile") })

	t.Log("kleidi is killed on each node in turn")
	for _, m := range c.Nodes {
		m.Serving.Kill()
		m.ServeOpen()
	}
	names = append(names, "without-a-member", "meanwhile")
	c.everywhere(t, names...)

	t.Log("all machines restart at once")
	c.coldStart(t)
	for _, m := range c.Nodes {
		node.Eventually(t, 10*time.Minute, m.Name+" reads all Secrets", func() error { return m.Holds(names...) })
	}
	threenodes.InStep(t, c.Nodes...)
}

// TestOtherBootDoesNotJoin: the approved machine does not join with another boot.
func TestOtherBootDoesNotJoin(t *testing.T) {
	c := newControlPlane(t, "secrets")
	first, second := c.Nodes[0], c.Nodes[1]
	first.ServeOpen()
	other := second.Kernel
	other.Kernel = "6.66-other"
	second.Reboot(other)
	args := c.approve(t, first, second)
	node.Again(t, 5*time.Minute, "a machine with another kernel is refused", func() error {
		_, err := second.Try("join", args...)
		if err == nil {
			return errors.New("it joins")
		}
		if strings.Contains(err.Error(), "boot policy") {
			return nil
		}
		return err
	}, node.JoinAgain...)
	if _, err := os.Stat(second.Path("state/keyring.json")); err == nil {
		t.Error("it has a keyring")
	}
}
