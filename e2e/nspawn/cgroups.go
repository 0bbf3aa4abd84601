package nspawn

import (
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// mounted is where the control groups of this machine are.
const mounted = "/sys/fs/cgroup"

// hierarchies returns the folders of this process's control groups.
func hierarchies(t testing.TB) (folders []string) {
	t.Helper()
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(own)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		name, path := strings.TrimPrefix(fields[1], "name="), fields[2]
		folder := filepath.Join(mounted, name, path)
		if name == "" { // version 2
			folder = filepath.Join(mounted, "unified", path)
			if _, err := os.Stat(folder); err != nil {
				// A group with processes gives its children no controllers, except the first
				folder = mounted
			}
		}
		if _, err := os.Stat(folder); err == nil {
			folders = append(folders, folder)
		}
	}
	return folders
}

// controlGroups makes a control group for a machine in every hierarchy. Without them, two
// machines would see the same groups, and each systemd and kubelet would end the other's
// processes.
func controlGroups(t testing.TB, name string) (groups []string) {
	t.Helper()
	for _, h := range hierarchies(t) {
		g := filepath.Join(h, "kleidi-"+name)
		if err := os.Mkdir(g, 0o755); err != nil && !os.IsExist(err) {
			t.Fatal(err)
		}
		// In version 1, a new group takes no process before it has these
		for _, setting := range []string{"cpuset.cpus", "cpuset.mems"} {
			b, err := os.ReadFile(filepath.Join(h, setting))
			if err == nil && strings.Contains(h, "/cpuset") {
				err = os.WriteFile(filepath.Join(g, setting), b, 0o644)
			}
			if err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
		}
		groups = append(groups, g)
	}
	return groups
}

// inGroups returns the words to put before a command to run it in control groups.
func inGroups(groups []string) []string {
	line := []string{"sh", "-euc", `until [ "$1" = -- ]; do echo $$ >"$1/cgroup.procs"; shift; done; shift; exec "$@"`, "sh"}
	return append(append(line, groups...), "--")
}

// removeGroups removes a machine's control groups once its last process has ended.
func removeGroups(t testing.TB, groups []string) {
	t.Helper()
	node.Eventually(t, 2*time.Minute, "the machine's control groups are removed", func() error {
		for _, g := range groups {
			if err := removeTree(g); err != nil {
				return err
			}
		}
		return nil
	})
}

// killGroups ends all processes of a machine.
func killGroups(groups []string) {
	for _, g := range groups {
		_ = filepath.WalkDir(g, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.Name() != "cgroup.procs" {
				return nil // the group may be gone
			}
			processes, _ := os.ReadFile(path)
			for _, p := range strings.Fields(string(processes)) {
				if pid, err := strconv.Atoi(p); err == nil && pid > 0 {
					_ = syscall.Kill(pid, syscall.SIGKILL)
				}
			}
			return nil
		})
	}
}

func removeTree(group string) error {
	entries, err := os.ReadDir(group)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(group, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.Remove(group)
}
