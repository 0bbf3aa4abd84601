package ha

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/threenodes"
)

// TestJoinBreaksOff breaks off a join at each packet between the joining machine and the
// admitting node. Afterwards no machine has a keyring without being shown by `node list`,
// and the join can be finished. Package e2e/kill kills the joining machine.
func TestJoinBreaksOff(t *testing.T) {
	loopback := func() []cluster.Host { return []cluster.Host{cluster.Loopback, cluster.Loopback} }
	for _, fault := range []struct {
		name   string
		hosts  func() []cluster.Host
		breaks func(*testing.T, *breaking, *net.TCPConn)
	}{
		{"the connection ends", loopback, func(_ *testing.T, b *breaking, _ *net.TCPConn) { b.wire.cut() }},
		{"the admitting node is killed", loopback, func(_ *testing.T, b *breaking, _ *net.TCPConn) { b.seat.Serving.Kill() }},
		{"the receiver is cut off for a while", func() []cluster.Host { return threenodes.Network.Hosts }, partitionReceiver},
	} {
		t.Run(fault.name, func(t *testing.T) {
			t.Parallel()
			b := newBreaking(t, fault.hosts())
			at := 1
			for ; b.breakAt(t, at, fault.breaks); at++ {
			}
			if t.Logf("a join has %d packets", at-1); at < 8 {
				t.Error("too few packets for the messages of a join")
			}
		})
	}
}

// partitionReceiver cuts off the host to which a packet is addressed, and connects it
// again once the packet was sent in vain.
func partitionReceiver(t *testing.T, b *breaking, to *net.TCPConn) {
	host := 1
	if to.RemoteAddr().String() == b.wire.to {
		host = 0
	}
	heal := threenodes.Network.Partition(t, host)
	go func() {
		defer heal()
		raw, err := to.SyscallConn()
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for resent := false; err == nil && !resent; <-tick.C {
			if failed := raw.Control(func(fd uintptr) {
				var info *unix.TCPInfo
				if info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
					resent = info.Total_retrans > 0
				}
			}); failed != nil {
				return // the connection has ended
			}
		}
	}()
}

// breaking is a seat and a machine that joins through a wire.
type breaking struct {
	seat, joiner *node.Node
	wire         *wire
	ek, policy   string
	before       string // the seat's state folder before the join
	join         *exec.Cmd
	cutOff       int // how many undisturbed joins were cut off
}

func newBreaking(t *testing.T, hosts []cluster.Host) *breaking {
	t.Helper()
	address := net.JoinHostPort(hosts[0].Address, node.FreePort(t))
	b := &breaking{wire: newWire(t, hosts[0].Gateway(), address)}
	b.seat = node.Make(t, node.Setup{On: hosts[0].Command(), Settings: fmt.Sprintf("node: cp-1\njoin:\n  listen: %s\n  advertise: %s\n", address, b.wire.address())})
	b.joiner = node.Make(t, node.Setup{On: hosts[1].Command(), Settings: "node: cp-2\n", Uninitialised: true})
	b.policy = b.seat.BootPolicy()
	var identity struct{ EK string }
	b.joiner.JSON(&identity, "node", "identity")
	b.ek = identity.EK
	b.seat.ServeOpen()
	b.approve(t) // writes format 2
	b.before = b.seat.Path("before")
	must(t, os.CopyFS(b.before, os.DirFS(b.seat.Path("state"))))
	return b
}

// approve approves the machine, and returns the arguments of the printed command.
func (b *breaking) approve(t *testing.T) []string {
	t.Helper()
	return b.seat.ApproveEK("cp-2", b.ek, b.policy)
}

// breakAt breaks off a join at one packet, and finishes it. It reports false if the join
// ended before that packet.
func (b *breaking) breakAt(t *testing.T, packet int, fault func(*testing.T, *breaking, *net.TCPConn)) bool {
	t.Helper()
	args := b.approve(t)
	b.join = b.joiner.Command("join", args...)
	fired := b.wire.breakAt(packet, func(to *net.TCPConn) { fault(t, b, to) })
	out, err := b.join.CombinedOutput()
	if !fired() {
		// The join may have taken too long for the seat. The packet's turn has not come then.
		if b.cutOff < 3 && node.HasOneOf(string(out), node.JoinAgain) {
			b.cutOff++
			t.Logf("packet %d again: %v\n%s", packet, err, out)
			b.reset(t)
			return b.breakAt(t, packet, fault)
		}
		if err != nil {
			t.Fatalf("an undisturbed join fails: %v\n%s", err, out)
		}
		return false
	}
	if b.seat.Serving.Alive() != nil {
		b.seat.ServeOpen()
		args = b.approve(t)
	}
	if b.holds() && !b.listed() {
		t.Fatalf("packet %d: the machine has the keyring, and node list does not show it", packet)
	}
	node.Eventually(t, 2*time.Minute, fmt.Sprintf("the join that broke off at packet %d is finished", packet), func() error {
		_, err := b.joiner.Try("join", args...)
		return err
	})
	if !b.holds() || !b.listed() {
		t.Fatalf("packet %d: the join is finished; the machine has a keyring: %v, node list shows it: %v", packet, b.holds(), b.listed())
	}
	if a, j := b.seat.Keyring(), b.joiner.Keyring(); a.Current.KeyID != j.Current.KeyID || a.Revision != j.Revision {
		t.Fatalf("packet %d: the machine has %s in revision %d, the seat %s in %d", packet, j.Current.KeyID, j.Revision, a.Current.KeyID, a.Revision)
	}
	b.reset(t)
	return true
}

// holds reports whether the machine has a keyring.
func (b *breaking) holds() bool {
	_, err := os.Stat(b.joiner.Path("state/keyring.json"))
	return err == nil
}

// listed reports whether the seat's node list shows the machine.
func (b *breaking) listed() bool {
	return strings.Contains(string(b.seat.Run("node", "list")), "cp-2")
}

// reset restores both to the state before the join.
func (b *breaking) reset(t *testing.T) {
	t.Helper()
	b.seat.Serving.Stop()
	state := b.seat.Path("state")
	must(t, errors.Join(os.RemoveAll(b.joiner.Path("state")), os.RemoveAll(state), os.CopyFS(state, os.DirFS(b.before)), os.Chmod(state, 0o700)))
	b.seat.ServeOpen()
}

// wire passes connections on to an address, packet by packet.
type wire struct {
	listener net.Listener
	to       string

	mu    sync.Mutex
	open  []*net.TCPConn
	seen  int
	at    int
	fault func(to *net.TCPConn)
	done  chan struct{} // closed once the fault has happened
}

func newWire(t *testing.T, host, to string) *wire {
	t.Helper()
	l, err := net.Listen("tcp", host+":0")
	must(t, err)
	w := &wire{listener: l, to: to}
	t.Cleanup(func() {
		l.Close()
		w.cut()
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			w.connect(c.(*net.TCPConn))
		}
	}()
	return w
}

func (w *wire) address() string { return w.listener.Addr().String() }

func (w *wire) connect(c *net.TCPConn) {
	to, err := net.DialTimeout("tcp", w.to, time.Minute)
	if err != nil {
		c.Close()
		return
	}
	d := to.(*net.TCPConn)
	w.mu.Lock()
	w.open = append(w.open, c, d)
	w.mu.Unlock()
	go w.pass(c, d)
	go w.pass(d, c)
}

// pass passes packets on until the connection ends.
func (w *wire) pass(from, to *net.TCPConn) {
	defer from.Close()
	defer to.Close()
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		if err != nil {
			return
		}
		w.count(to)
		if _, err := to.Write(b[:n]); err != nil {
			return
		}
	}
}

// count counts a packet, and makes the fault happen when its turn comes.
func (w *wire) count(to *net.TCPConn) {
	w.mu.Lock()
	w.seen++
	fault, done := w.fault, w.done
	now := w.seen == w.at
	w.mu.Unlock()
	if now {
		fault(to)
		close(done)
	}
}

// breakAt makes a fault happen before a packet from now on is passed on. fired reports
// whether it has, and ends the counting.
func (w *wire) breakAt(packet int, fault func(*net.TCPConn)) (fired func() bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen, w.at, w.fault, w.done = 0, packet, fault, make(chan struct{})
	return func() bool {
		w.mu.Lock()
		happens := w.seen >= w.at
		done := w.done
		w.at = 0
		w.mu.Unlock()
		if happens {
			<-done
		}
		return happens
	}
}

// fired is closed once the fault of breakAt has happened.
func (w *wire) fired() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.done
}

// cut ends all connections.
func (w *wire) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.open {
		c.Close()
	}
	w.open = nil
}
