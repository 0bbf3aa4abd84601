package simboot_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// childVariable names the folder over which this test binary, started by
// TestKilledOwner, is to boot a machine.
const childVariable = "SIMBOOT_TEST_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childVariable); dir != "" {
		bootAndHang(dir)
	}
	os.Exit(m.Run())
}

// bootAndHang boots, says so and waits to be killed.
func bootAndHang(dir string) {
	m, err := simboot.New(dir)
	if err == nil {
		err = m.Boot(context.Background(), simboot.Baseline(simboot.GRUB))
	}
	fmt.Println("booted:", err)
	_, _ = os.Stdin.Read(make([]byte, 1))
	os.Exit(1)
}

// TestKilledOwner: when the process that runs a machine is killed, its swtpm
// ends, and the next process gets the same TPM.
func TestKilledOwner(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	writeNV(t, m.TPM(), "kept")
	if err := m.PowerOff(); err != nil {
		t.Fatal(err)
	}
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), childVariable+"="+m.Dir())
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := child.StdinPipe(); err != nil { // open, so that the child waits
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || strings.TrimSpace(line) != "booted: <nil>" {
		t.Errorf("the child says %q, %v", line, err)
	}
	if lock := filepath.Join(m.Dir(), "lock"); !holdsOpen(t, childOf(t, child.Process.Pid), lock) {
		t.Errorf("swtpm does not hold %s, so a second one could start before it has ended", lock)
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait()

	next := tpmtest.Attach(t, m.Dir())
	if got := next.Current().Loader; got != simboot.GRUB {
		t.Errorf("the machine booted by %q last, want what the killed process booted", got)
	}
	next.Reboot(simboot.Baseline(simboot.UKI))
	if got, err := readNV(t.Context(), next.TPM()); got != "kept" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// childOf returns the only child of a process.
func childOf(t *testing.T, parent int) int {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range stats {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended meanwhile
		}
		var pid, ppid int
		var name, state string
		if n, _ := fmt.Sscanf(string(raw), "%d %s %s %d", &pid, &name, &state, &ppid); n == 4 && ppid == parent {
			return pid
		}
	}
	t.Fatalf("process %d has no child", parent)
	return 0
}

// holdsOpen reports whether a process has a file open.
func holdsOpen(t *testing.T, pid int, file string) bool {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(fds, func(fd string) bool {
		target, err := os.Readlink(fd)
		return err == nil && target == file
	})
}
