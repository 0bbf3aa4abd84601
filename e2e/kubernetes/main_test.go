package kubernetes

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"testing"
)

// versions are the folders of e2e/servers that hold a kube-apiserver.
var versions = []string{"kube-apiserver-1.37", "kube-apiserver-1.29"}

// binaries are paths by name: "etcd", "vault" and each of versions.
var binaries = map[string]string{}

// scratch is a folder for all tests.
var scratch string

func TestMain(m *testing.M) {
	flag.Parse()
	// The machines wait more than they work; by default only as many as there are cores would run.
	if err := flag.Set("test.parallel", "16"); err != nil {
		panic(err)
	}
	if err := find(); err != nil {
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

func find() error {
	names := append([]string{"etcd", "vault"}, versions...)
	build := exec.Command("../servers/build", names...)
	build.Stderr = os.Stderr
	out, err := build.Output()
	if err != nil {
		return fmt.Errorf("e2e/servers/build: %w", err)
	}
	lines := bufio.NewScanner(bytes.NewReader(out))
	for _, name := range names {
		if !lines.Scan() {
			return fmt.Errorf("e2e/servers/build prints no path for %s", name)
		}
		binaries[name] = lines.Text()
	}
	return nil
}
