package cluster

import (
	"testing"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// Host is the place of a server.
type Host struct {
	// Address is the IP address on which the server listens.
	Address string
	// Namespace is the name of the network namespace in `ip netns`; empty means the
	// test's own.
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
	on := h.Command()
	return node.Start(t, log, on[0], append(append(on[1:], binary), args...)...)
}
