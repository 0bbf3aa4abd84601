package cluster

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
)

// Built returns the paths of servers, by the names of their folders in e2e/servers, and
// builds the missing ones. The test must run in a folder beside e2e/servers.
func Built(names ...string) (map[string]string, error) {
	build := exec.Command("../servers/build", names...)
	build.Stderr = os.Stderr
	out, err := build.Output()
	if err != nil {
		return nil, fmt.Errorf("e2e/servers/build: %w", err)
	}
	paths := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(out))
	for _, name := range names {
		if !lines.Scan() {
			return nil, fmt.Errorf("e2e/servers/build prints no path for %s", name)
		}
		paths[name] = lines.Text()
	}
	return paths, nil
}
