package ha

import (
	"fmt"
	"os"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/cluster"
)

const apiserver = "kube-apiserver-1.37"

// binaries are paths by name, and network has the hosts.
var (
	binaries map[string]string
	network  *cluster.Network
)

func TestMain(m *testing.M) {
	if code, isolated := cluster.Isolated(); isolated {
		os.Exit(code)
	}
	var err error
	if binaries, err = cluster.Built("etcd", apiserver); err == nil {
		network, err = cluster.NewNetwork(3)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}
