package packages

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// machine is a Debian with a running systemd, in a container.
type machine struct {
	t      *testing.T
	root   string // its root folder, seen from here
	leader int    // the process ID of its systemd
}

// simulated is where the simulated TPM and its event logs lie, inside the machine.
const simulated = "/opt/machine"

// boot unpacks a machine and boots it.
func boot(t *testing.T) *machine {
	t.Helper()
	// nspawn forbids a root below /tmp of which a part is a mount; and a socket's path is short
	dir, err := os.MkdirTemp("", "pk")
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, root: filepath.Join(dir, "r")}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	run(t, "mkdir", m.root)
	run(t, "tar", "-C", m.root, "-xf", filepath.Join(strings.TrimSpace(run(t, "../../.ci/base")), "systemd.tar"))
	if err := os.MkdirAll(m.path(simulated), 0o700); err != nil {
		t.Fatal(err)
	}
	tpmtest.Attach(t, m.path(simulated)).Reboot(simboot.Baseline(simboot.UKI))

	console, err := os.Create(filepath.Join(dir, "console"))
	if err != nil {
		t.Fatal(err)
	}
	// With this capability nspawn's filter lets the unit lock memory, within the limit.
	// Systemd 257 wants to be asked before it takes a machine with version 1 of cgroups.
	cmd := exec.Command("systemd-nspawn", "--quiet", "--directory="+m.root, "--boot", "--register=no", "--keep-unit", "--private-network",
		"--machine=cp-1", "--console=pipe", "--capability=CAP_IPC_LOCK", "--system-call-filter=memfd_secret", "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1")
	cmd.Env = append(os.Environ(), "SYSTEMD_LOG_LEVEL=err")
	cmd.Stdout, cmd.Stderr = console, console
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(console.Name())
			t.Logf("console:\n%s", b)
			if m.leader != 0 {
				out, _ := m.try("journalctl --no-pager -o cat -n 80")
				t.Logf("journal:\n%s", out)
			}
		}
		if m.leader != 0 {
			_ = syscall.Kill(m.leader, syscall.Signal(34+4)) // SIGRTMIN+4: power off
		}
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
	})
	node.Eventually(t, 60*time.Second, "the machine is up", func() error {
		select {
		case <-ended:
			b, _ := os.ReadFile(console.Name())
			t.Fatalf("systemd-nspawn ended: %s", b)
		default:
		}
		if m.leader == 0 {
			children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
			if m.leader, _ = strconv.Atoi(strings.TrimSpace(string(children))); m.leader == 0 {
				return fmt.Errorf("no leader: %q, %w", children, err)
			}
		}
		// "degraded" is up as well: no unit of the machine concerns kleidi
		if out, _ := m.try("systemctl is-system-running"); out != "running\n" && out != "degraded\n" {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	return m
}

// path is where a file of the machine lies, seen from here. What the machine mounts
// itself, such as /run, is at live.
func (m *machine) path(file string) string { return filepath.Join(m.root, file) }

func (m *machine) live(file string) string { return fmt.Sprintf("/proc/%d/root%s", m.leader, file) }

// try runs commands in the machine.
func (m *machine) try(commands string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", "-t", strconv.Itoa(m.leader), "-a", "env", "-i", "HOME=/root", "LC_ALL=C",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive", "sh", "-euc", "cd /root; "+commands)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// sh runs commands in the machine that must succeed.
func (m *machine) sh(commands string) string {
	m.t.Helper()
	out, err := m.try(commands)
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", commands, err, out)
	}
	return out
}

// write writes a file of the machine.
func (m *machine) write(file, content string) {
	m.t.Helper()
	if err := os.WriteFile(m.path(file), []byte(content), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) exists(file string) bool {
	_, err := os.Lstat(m.path(file))
	return err == nil
}

// configure makes /etc/kleidi/config.yaml, with the simulated TPM.
func (m *machine) configure(more string) {
	m.t.Helper()
	m.write("etc/kleidi/config.yaml", fmt.Sprintf(`apiVersion: kleidi.beezy.dev/v1alpha1
kind: KleidiConfiguration
node: cp-1
tpm:
  device: unix:%[1]s/tpm.sock
  eventLog: %[1]s/binary_bios_measurements
  userspaceEventLog: %[1]s/tpm2-measure.log
%s`, simulated, more))
}

// run runs a command here that must succeed, and returns what it prints.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.Bytes())
	}
	return string(out)
}
