package nspawn

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// Machine is a Debian with systemd, in a container.
type Machine struct {
	// TPM is the simulated machine around it: a boot is measured by its Reboot.
	TPM *tpmtest.Machine

	t     testing.TB
	setup Setup
	dir   string
	// running is shared by the views of one machine that With returns.
	running *running
}

// running is a booted machine.
type running struct {
	leader int // the process ID of its systemd
	ended  chan struct{}
	nspawn *exec.Cmd
	groups []string
}

// Setup describes a machine.
type Setup struct {
	// Name is the host name.
	Name string
	// Archive is the root file system, a file that .ci/base makes.
	Archive string
	// Args are further flags of systemd-nspawn.
	Args []string
	// Env are further variables of systemd-nspawn.
	Env []string
}

// Simulated is the folder of the simulated TPM and its event logs, inside the machine.
const Simulated = "/opt/machine"

// New unpacks a machine, whose TPM has booted a unified kernel image. Boot starts systemd.
func New(t testing.TB, s Setup) *Machine {
	t.Helper()
	// nspawn refuses a root below /tmp with a mount inside it, and the path of a socket
	// must be short
	dir, err := os.MkdirTemp("", "ns")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	m := &Machine{t: t, setup: s, dir: dir, running: &running{}}
	if err := os.Mkdir(m.Path("/"), 0o755); err != nil {
		t.Fatal(err)
	}
	Run(t, "tar", "-C", m.Path("/"), "-xf", filepath.Join(strings.TrimSpace(Run(t, "../../.ci/base")), s.Archive))
	m.Write("etc/systemd/system.conf.d/busy.conf", "[Manager]\nDefaultTimeoutStartSec=15min\n")
	if err := os.MkdirAll(m.Path(Simulated), 0o700); err != nil {
		t.Fatal(err)
	}
	m.TPM = tpmtest.Attach(t, m.Path(Simulated))
	m.TPM.Reboot(simboot.Baseline(simboot.UKI))
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("console:\n%s", tail(m.console()))
			out, _ := m.Try("journalctl --no-pager -o short-monotonic -n 60")
			t.Logf("journal:\n%s", out)
		}
		m.PowerOff()
	})
	return m
}

// With returns the same machine for a subtest.
func (m *Machine) With(t testing.TB) *Machine {
	view := *m
	view.t = t
	return &view
}

// Boot starts systemd, and returns when its start has ended.
func (m *Machine) Boot() {
	m.t.Helper()
	console, err := os.OpenFile(m.console(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		m.t.Fatal(err)
	}
	defer console.Close()
	groups := controlGroups(m.t, filepath.Base(m.dir))
	// systemd 257 must be told to accept a machine with version 1 of cgroups.
	args := slices.Concat(inGroups(groups), []string{"systemd-nspawn", "--quiet", "--directory=" + m.Path("/"), "--boot", "--register=no", "--keep-unit", "--private-network",
		// nspawn keeps a folder of the machine's name, so the name is this test's own.
		"--machine=" + filepath.Base(m.dir), "--hostname=" + m.setup.Name, "--console=pipe"}, m.setup.Args, []string{"SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"})
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = slices.Concat(os.Environ(), []string{"SYSTEMD_LOG_LEVEL=err"}, m.setup.Env)
	cmd.Stdout, cmd.Stderr = console, console
	// A test that panics leaves no machine behind: nspawn shuts it down at this signal.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGTERM}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		// The kernel sends Pdeathsig when the thread that started the child ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(ended)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		removeGroups(m.t, groups)
		m.t.Fatal(err)
	}
	*m.running = running{ended: ended, nspawn: cmd, groups: groups}
	m.waitUp(cmd)
}

func (m *Machine) waitUp(nspawn *exec.Cmd) {
	m.t.Helper()
	node.Eventually(m.t, 10*time.Minute, "the machine is up", func() error {
		select {
		case <-m.running.ended:
			m.t.Fatalf("systemd-nspawn ended: %s", tail(m.console()))
		default:
		}
		if m.running.leader == 0 {
			var err error
			if m.running.leader, err = leaderOf(nspawn.Process.Pid); err != nil {
				return err
			}
		}
		// "degraded" counts as up: the failed unit does not concern kleidi
		if out, _ := m.Try("systemctl is-system-running"); out != "running\n" && out != "degraded\n" {
			return errors.New(out)
		}
		return nil
	})
}

// leaderOf returns the container's systemd. The child before it sets the container up and
// ends, perhaps a while after it was seen.
func leaderOf(nspawn int) (int, error) {
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", nspawn))
	if err != nil {
		return 0, err
	}
	for child := range strings.FieldsSeq(string(children)) {
		if name, err := os.ReadFile("/proc/" + child + "/comm"); err == nil && string(name) == "systemd\n" {
			return strconv.Atoi(child)
		}
	}
	return 0, fmt.Errorf("none of the processes %q is systemd", children)
}

// PowerOff shuts the machine down. Its files, and its TPM, stay.
func (m *Machine) PowerOff() {
	m.t.Helper()
	r := m.running
	if r.nspawn == nil {
		return
	}
	select {
	case <-r.ended: // the leader's number may be another process's
	default:
		if r.leader != 0 {
			_ = syscall.Kill(r.leader, syscall.Signal(34+4)) // SIGRTMIN+4: power off
		}
	}
	select {
	case <-r.ended:
	case <-time.After(3 * time.Minute):
		m.t.Log("the machine does not shut down, and is cut off")
		killGroups(r.groups)
		<-r.ended
	}
	removeGroups(m.t, r.groups)
	*r = running{}
}

func (m *Machine) console() string { return filepath.Join(m.dir, "console") }

// Path returns the path of a machine's file, as seen from here. Mounts inside the machine,
// such as /run, are below Live.
func (m *Machine) Path(file string) string { return filepath.Join(m.dir, "r", file) }

// Live returns the path of a running machine's file, as seen from here, with all mounts.
func (m *Machine) Live(file string) string {
	return fmt.Sprintf("/proc/%d/root%s", m.running.leader, file)
}

// commandTime bounds commands, on a busy machine.
const commandTime = 5 * time.Minute

// Try runs commands in the machine.
func (m *Machine) Try(commands string) (string, error) {
	return m.TryFor(commandTime, commands)
}

// TryFor runs commands in the machine, at most for the given time.
func (m *Machine) TryFor(limit time.Duration, commands string) (string, error) {
	return m.tryFor(limit, nil, commands)
}

// Input runs commands in the machine that read from the given input.
func (m *Machine) Input(input io.Reader, commands string) (string, error) {
	return m.tryFor(10*time.Minute, input, commands)
}

func (m *Machine) tryFor(limit time.Duration, input io.Reader, commands string) (string, error) {
	if m.running.leader == 0 {
		return "", errors.New("the machine is off")
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := m.Command(ctx, commands)
	cmd.Stdin = input
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Command returns commands that run in the machine, which were not started yet.
func (m *Machine) Command(ctx context.Context, commands string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", "-t", strconv.Itoa(m.running.leader), "-a", "env", "-i", "HOME=/root", "LC_ALL=C",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive", "sh", "-euc", "cd /root; "+commands)
}

// Sh runs commands in the machine that must succeed.
func (m *Machine) Sh(commands string) string {
	m.t.Helper()
	return m.ShFor(commandTime, commands)
}

// ShFor runs commands in the machine that must succeed in the given time.
func (m *Machine) ShFor(limit time.Duration, commands string) string {
	m.t.Helper()
	out, err := m.TryFor(limit, commands)
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", commands, err, out)
	}
	return out
}

// Write writes a file of the machine, with the folders above it.
func (m *Machine) Write(file, content string) {
	m.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(m.Path(file)), 0o755), os.WriteFile(m.Path(file), []byte(content), 0o644)); err != nil {
		m.t.Fatal(err)
	}
}

// Read returns the content of a file of the machine.
func (m *Machine) Read(file string) string {
	m.t.Helper()
	b, err := os.ReadFile(m.Path(file))
	if err != nil {
		m.t.Fatal(err)
	}
	return string(b)
}

// Exists reports whether a file of the machine exists.
func (m *Machine) Exists(file string) bool {
	_, err := os.Lstat(m.Path(file))
	return err == nil
}

// Configure writes kleidi's configuration, with the simulated TPM. More is YAML of
// top-level keys.
func (m *Machine) Configure(more string) {
	m.t.Helper()
	m.Write("etc/kleidi/config.yaml", fmt.Sprintf(`apiVersion: kleidi.beezy.dev/v1alpha1
kind: KleidiConfiguration
node: %[2]s
tpm:
  device: unix:%[1]s/tpm.sock
  eventLog: %[1]s/binary_bios_measurements
  userspaceEventLog: %[1]s/tpm2-measure.log
%[3]s`, Simulated, m.setup.Name, more))
}

// Fetch brings what machines and packages are made of into the caches, for a test whose
// network reaches no registry: it makes the root file systems, and a package that it discards.
func Fetch() error {
	discarded, err := os.MkdirTemp("", "kleidi-package")
	if err != nil {
		return err
	}
	defer os.RemoveAll(discarded)
	for _, args := range [][]string{{"../../.ci/base"}, {"../../deploy/packages/build", cmp.Or(os.Getenv("KLEIDI"), "../../bin/kleidi"), "v1.0.0", discarded}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", args[0], err, out)
		}
	}
	return nil
}

// Package makes the packages of a version of kleidi in a new folder, and returns that
// folder.
func Package(t testing.TB, version string) string {
	t.Helper()
	out := t.TempDir()
	Run(t, "../../deploy/packages/build", node.Binary(t), version, out)
	return out
}

// PackagePKCS11 makes those of a kleidi with PKCS#11.
func PackagePKCS11(t testing.TB, version string) string {
	t.Helper()
	out := t.TempDir()
	binary := filepath.Join(t.TempDir(), "kleidi")
	Run(t, "env", "CGO_ENABLED=1", "go", "build", "-o", binary, "../../cmd/kleidi")
	Run(t, "../../deploy/packages/build", binary, version, out, "pkcs11")
	return out
}

// Run runs a command here that must succeed, and returns what it prints.
func Run(t testing.TB, name string, args ...string) string {
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

func tail(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-8000):])
}
