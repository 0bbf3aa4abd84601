package vault

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// names are the folders of e2e/servers that the tests need.
var names = []string{"vault", "etcd", "kube-apiserver-1.37"}

// binaries are paths by name.
var binaries = map[string]string{}

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == commandName {
		if err := command(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		os.Exit(0)
	}
	if err := find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func find() error {
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
