package cluster

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// inNetwork is set for the process that Isolated has started.
const inNetwork = "KLEIDI_E2E_NETWORK"

// Isolated starts this program again in network and mount namespaces of its own, and
// returns that program's exit code. Hosts and links that it makes are gone when it ends,
// and are never visible outside. In the program that it started, it returns false. It
// needs root.
//
// The network of its own reaches no registry, so fetch runs before, and brings whatever the
// tests need into the caches.
func Isolated(fetch func() error) (code int, isolated bool) {
	if os.Getenv(inNetwork) != "" {
		return 0, false
	}
	if err := fetch(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1, true
	}
	self := exec.Command("/proc/self/exe", os.Args[1:]...)
	self.Stdin, self.Stdout, self.Stderr = os.Stdin, os.Stdout, os.Stderr
	self.Env = append(os.Environ(), inNetwork+"=1")
	self.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := self.Run(); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return exit.ExitCode(), true
		}
		fmt.Fprintln(os.Stderr, "a network of its own, which needs root:", err)
		return 1, true
	}
	return 0, true
}

// Network is a bridge with hosts, each a network namespace. The test stands on the bridge.
type Network struct{ Hosts []Host }

// NewNetwork makes a number of hosts, in a program that [Isolated] has started.
func NewNetwork(hosts int) (*Network, error) {
	n := &Network{}
	for _, c := range []string{
		"mount --make-rprivate /", "mkdir -p /run/netns", "mount -t tmpfs netns /run/netns",
		"ip link set lo up", "ip link add br0 type bridge", "ip addr add " + bridge + "/24 dev br0", "ip link set br0 up",
	} {
		if err := run(c); err != nil {
			return nil, err
		}
	}
	for i := range hosts {
		h := Host{Address: "10.99.0." + strconv.Itoa(i+1), Namespace: "node" + strconv.Itoa(i+1)}
		port := "port" + strconv.Itoa(i+1)
		for _, c := range []string{
			"ip netns add " + h.Namespace,
			"ip link add " + port + " type veth peer name eth0 netns " + h.Namespace,
			"ip link set " + port + " master br0 up",
			"ip -n " + h.Namespace + " link set lo up",
			"ip -n " + h.Namespace + " addr add " + h.Address + "/24 dev eth0",
			"ip -n " + h.Namespace + " link set eth0 up",
		} {
			if err := run(c); err != nil {
				return nil, err
			}
		}
		n.Hosts = append(n.Hosts, h)
	}
	return n, nil
}

func run(command string) error {
	args := strings.Fields(command)
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", command, err, out)
	}
	return nil
}

// Partition cuts a host off from the others and from the test, until the returned function
// connects it again, or the test ends.
func (n *Network) Partition(t testing.TB, host int) (heal func()) {
	t.Helper()
	link := func(state string) func() {
		return func() {
			t.Helper()
			if err := run("ip link set port" + strconv.Itoa(host+1) + " " + state); err != nil {
				t.Error(err)
			}
		}
	}
	link("down")()
	t.Cleanup(link("up"))
	return link("up")
}

// Command returns the words to put before a program to run it on this host, for
// node.Setup's On.
func (h Host) Command() []string {
	if h.Namespace == "" {
		return nil
	}
	return []string{"ip", "netns", "exec", h.Namespace}
}

// Gateway is the address of the test itself, seen from the host.
func (h Host) Gateway() string {
	if h.Namespace == "" {
		return h.Address
	}
	return bridge
}

// bridge is the address on the bridge of hosts.
const bridge = "10.99.0.254"
