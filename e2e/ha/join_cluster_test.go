package ha

import (
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/threenodes"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// TestJoinWithoutStore makes a part of the cluster that a join needs fail, at every few
// packets of the join, so that each phase is hit: the leading etcd member, the
// kube-apiserver of the admitting node, or that node's way to all others. Afterwards no
// machine has a keyring without being listed in the cluster store, and the join can be
// finished.
func TestJoinWithoutStore(t *testing.T) {
	c := newControlPlane(t, "secrets")
	first, second := c.Nodes[0], c.Nodes[1]
	c.Share(t)
	first.PutSoon(t, "before")
	var leads *cluster.Etcd // before a join; the fault happens in another goroutine, which must not end the test
	b := &breakingShared{controlPlane: c, wire: newWire(t, first.Host.Gateway(), net.JoinHostPort(first.Host.Address, "9778"))}
	for _, fault := range []struct {
		name  string
		every int // the number of packets between two faults
		fails func(*testing.T) (mend func())
	}{
		{"the etcd member that leads is killed", 7, func(t *testing.T) func() {
			leads.Kill()
			return func() { leads.Start(c.T); leads.WaitHealthy(t) }
		}},
		{"the API is away", 7, func(t *testing.T) func() {
			first.API.Kill()
			return func() { first.API.Start(c.T) }
		}},
		{"the admitting node is cut off", 9, func(t *testing.T) func() { return threenodes.Network.Partition(t, 0) }},
	} {
		t.Run(fault.name, func(t *testing.T) {
			at := 2
			for leads = c.leader(t); b.breakAt(t, at, fault.fails); at += fault.every {
				leads = c.leader(t)
			}
			if t.Logf("a join has fewer than %d packets", at); at < 8 {
				t.Error("too few packets for the messages of a join")
			}
		})
	}
	c.admit(t, first, second)
	second.ServeOpen()
	second.API.Start(t)
	threenodes.InStep(t, first, second)
	threenodes.HoldSoon(t, []*machine{second}, "before")
}

// breakingShared is a node that shares its keyring, and a machine that joins through a wire.
type breakingShared struct {
	*controlPlane
	wire *wire
}

// breakAt makes a part that a join needs fail at one packet, repairs it, and finishes the
// join. It reports false if the join ended before that packet.
func (b *breakingShared) breakAt(t *testing.T, packet int, fails func(*testing.T) func()) bool {
	t.Helper()
	first, second := b.Nodes[0], b.Nodes[1]
	args := b.approve(t, first, second)
	through := append([]string{b.wire.address()}, args[1:]...)
	join := second.Command("join", through...)
	var mend func()
	fired := b.wire.breakAt(packet, func(*net.TCPConn) { mend = fails(t) })
	must(t, join.Start())
	ended := make(chan error, 1)
	go func() { ended <- join.Wait() }()
	select {
	case <-ended:
	case <-b.wire.fired():
		select {
		case <-ended:
		case <-time.After(3 * time.Second): // the join waits for the part that failed
			b.wire.cut()
			<-ended
		}
	}
	if fired() {
		mend()
	}
	if hasKeyring(second) && !slices.Contains(listed(t, first), second.Name) {
		t.Fatalf("packet %d: the machine has the keyring, and the cluster store does not list it", packet)
	}
	node.Eventually(t, 2*time.Minute, "the join is finished", func() error {
		_, err := second.Try("join", args...)
		return err
	})
	if !hasKeyring(second) || !slices.Contains(listed(t, first), second.Name) {
		t.Fatalf("packet %d: the join is finished; the machine has a keyring: %v", packet, hasKeyring(second))
	}
	must(t, os.RemoveAll(second.Path("state")))
	first.Run("node", "remove", second.Name, "--yes", "--cut-off", "--wait", "--timeout", "10m")
	return mend != nil
}

// listed returns the nodes of the keyring in the cluster store.
func listed(t *testing.T, m *machine) (names []string) {
	t.Helper()
	k, err := keyring.Parse(raw(t, m))
	must(t, err)
	for _, n := range k.Info().Nodes {
		names = append(names, n.Name)
	}
	return names
}

// hasKeyring reports whether a machine has a keyring.
func hasKeyring(m *machine) bool {
	_, err := os.Stat(m.Path("state/keyring.json"))
	return err == nil
}
