package cluster

import (
	"testing"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// Host is where a server runs.
type Host struct {
	// Address is the IP address that the server listens on.
	Address string
	// Namespace is the network namespace, as `ip netns` names it; empty is that of the test.
	Namespace string
}

// Loopback is the test's own machine.
var Loopback = Host{Address: "127.0.0.1"}

// start runs a server on the host.
func (h Host) start(t testing.TB, log, binary string, args ...string) *node.Process {
	t.Helper()
	if h.Namespace == "" {
		return node.Start(t, log, binary, args...)
	}
	return node.Start(t, log, "ip", append([]string{"netns", "exec", h.Namespace, binary}, args...)...)
}
