package threenodes

import (
	"fmt"
	"os"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/cluster"
)

const (
	apiserver         = "kube-apiserver-1.37"
	controllerManager = "kube-controller-manager-1.37"
)

// Binaries are the paths of the servers by name, and Network has the three hosts. Main
// sets both.
var (
	Binaries map[string]string
	Network  *cluster.Network
)

// Main runs the tests of a suite in a network of three hosts, and returns the exit code.
// Before, where the registries can be reached, it builds etcd, kube-apiserver and the named
// servers, and runs fetch.
func Main(m *testing.M, fetch func() error, servers ...string) int {
	servers = append(servers, "etcd", apiserver, controllerManager)
	code, isolated := cluster.Isolated(func() error {
		if _, err := cluster.Built(servers...); err != nil {
			return err
		}
		return fetch()
	})
	if isolated {
		return code
	}
	var err error
	if Binaries, err = cluster.Built(servers...); err == nil {
		Network, err = cluster.NewNetwork(3)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}
