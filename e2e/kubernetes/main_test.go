package kubernetes

import (
	"flag"
	"fmt"
	"os"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/cluster"
)

// versions are the folders of e2e/servers that hold a kube-apiserver.
var versions = []string{"kube-apiserver-1.37", "kube-apiserver-1.29"}

// binaries are paths by name: "etcd", "vault" and each of versions.
var binaries map[string]string

// scratch is a folder for all tests.
var scratch string

func TestMain(m *testing.M) {
	flag.Parse()
	// The machines wait more than they work; the default would run only one for each
	// core.
	if err := flag.Set("test.parallel", "16"); err != nil {
		panic(err)
	}
	var err error
	if binaries, err = cluster.Built(append([]string{"etcd", "vault"}, versions...)...); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(runAll(m))
}

func runAll(m *testing.M) int {
	var err error
	if scratch, err = os.MkdirTemp("", "kleidi-kubernetes"); err == nil {
		defer os.RemoveAll(scratch)
		err = prepareSoftHSM(scratch)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}
