package guest

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/nspawn"
)

const ovmf = "/usr/share/OVMF/"

// machine boots from a disk. Its TPM and its firmware's variables last from boot to boot.
type machine struct {
	t     *testing.T
	dir   string
	qemu  *process
	agent net.Conn
	lines *bufio.Reader
}

// agentUnit and agentScript run in the machine, and do what Sh asks for.
const (
	agentUnit = `[Unit]
Description=Runs the commands of this test machine's host
After=systemd-udevd.service
StartLimitIntervalSec=0
[Service]
ExecStart=/usr/local/sbin/agent
Environment=HOME=/root
Restart=always
RestartSec=2
[Install]
WantedBy=multi-user.target
`
	agentScript = `#!/bin/bash
exec 3<>/dev/virtio-ports/agent
while read -r line <&3; do
	base64 -d <<<"$line" >/run/commands
	code=0
	(cd /root; bash -eu /run/commands </dev/null >/run/said 2>&1) || code=$?
	printf '%s %s\n' "$code" "$(base64 -w0 /run/said)" >&3
done
`
)

// newMachine makes a machine with a fresh TPM. disk is its disk, which it writes to.
func newMachine(t *testing.T, dir string) *machine {
	t.Helper()
	m := &machine{t: t, dir: dir}
	nspawn.Run(t, "mkdir", m.path("tpm"))
	nspawn.Run(t, "swtpm_setup", "--tpm2", "--tpmstate", m.path("tpm"), "--pcr-banks", "sha256", "--logfile", m.path("swtpm_setup.log"))
	nspawn.Run(t, "cp", ovmf+"OVMF_VARS_4M.snakeoil.fd", m.path("variables"))
	t.Cleanup(func() {
		if t.Failed() {
			console, err := os.ReadFile(m.path("console"))
			t.Logf("the console (%v):\n%s", err, console[max(0, len(console)-4000):])
		}
		m.kill()
	})
	return m
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

// boot powers the machine on, and returns when it runs commands.
func (m *machine) boot() {
	m.t.Helper()
	begin := time.Now()
	for _, stale := range []string{"agent.sock", "console"} {
		_ = os.Remove(m.path(stale))
	}
	listener, err := node.Listener(m.path("tpm.sock"))
	if err != nil {
		m.t.Fatal(err)
	}
	swtpm := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+m.path("tpm"),
		"--ctrl", "type=unixio,fd=3", "--terminate", "--log", "file="+m.path("swtpm.log"))
	swtpm.ExtraFiles = []*os.File{listener}
	m.start(swtpm)
	listener.Close() // otherwise QEMU would not notice the end of swtpm
	// /dev/kvm may exist and still fail with this firmware
	m.qemu = m.start(exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "none",
		"-accel", "tcg,thread=multi", "-machine", "q35,smm=on", "-cpu", "max", "-smp", "2", "-m", "4096",
		"-global", "driver=cfi.pflash01,property=secure,value=on", "-global", "ICH9-LPC.disable_s3=1",
		"-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+ovmf+"OVMF_CODE_4M.secboot.fd",
		"-drive", "if=pflash,unit=1,format=raw,file="+m.path("variables"),
		"-serial", "file:"+m.path("console"),
		"-device", "virtio-serial-pci", "-chardev", "socket,id=agent,server=on,wait=off,path="+m.path("agent.sock"), "-device", "virtserialport,chardev=agent,name=agent",
		"-chardev", "socket,id=tpm,path="+m.path("tpm.sock"), "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0",
		"-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng0",
		"-drive", "if=none,id=disk,format=raw,cache=unsafe,file="+m.path("disk"), "-device", "virtio-blk-pci,drive=disk,bootindex=0"))
	eventually(m.t, time.Minute, "QEMU listens", func() (err error) {
		m.agent, err = net.Dial("unix", m.path("agent.sock"))
		return err
	})
	m.lines = bufio.NewReader(m.agent)
	m.ShFor(30*time.Minute, "systemctl is-system-running --wait || true")
	m.t.Logf("booted: %s", time.Since(begin).Round(time.Second))
}

// TryFor runs commands in the machine.
func (m *machine) TryFor(limit time.Duration, commands string) (string, error) {
	if err := m.agent.SetDeadline(time.Now().Add(limit)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(m.agent, base64.StdEncoding.EncodeToString([]byte(commands))); err != nil {
		return "", err
	}
	line, err := m.lines.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("no answer: %w", err)
	}
	code, said, _ := strings.Cut(strings.TrimSpace(line), " ")
	out, err := base64.StdEncoding.DecodeString(said)
	if n, notNumber := strconv.Atoi(code); err != nil || notNumber != nil {
		return "", errors.Join(err, notNumber)
	} else if n != 0 {
		return string(out), fmt.Errorf("exit code %d", n)
	}
	return string(out), nil
}

// ShFor runs commands that must succeed.
func (m *machine) ShFor(limit time.Duration, commands string) string {
	m.t.Helper()
	begin := time.Now()
	out, err := m.TryFor(limit, commands)
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", commands, err, out)
	}
	if took := time.Since(begin); took > 5*time.Second {
		m.t.Logf("%s: %s", strings.TrimSpace(commands), took.Round(time.Second))
	}
	return out
}

// Sh runs commands that must succeed.
func (m *machine) Sh(commands string) string {
	m.t.Helper()
	return m.ShFor(20*time.Minute, commands)
}

// reboot restarts the machine in an orderly way.
func (m *machine) reboot() {
	m.t.Helper()
	_, _ = m.TryFor(time.Minute, "systemctl reboot --no-block") // it may end before it answers
	select {
	case <-m.qemu.ended:
	case <-time.After(30 * time.Minute):
		m.t.Fatal("the machine does not shut down")
	}
	m.agent.Close()
	m.boot()
}

func (m *machine) kill() {
	if m.qemu != nil {
		_ = m.qemu.cmd.Process.Kill()
		<-m.qemu.ended
	}
}

// process is a program that ends with this one, even if this one is killed.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

func (m *machine) start(cmd *exec.Cmd) *process {
	m.t.Helper()
	p := &process{cmd: cmd, ended: make(chan struct{})}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		// The kernel sends Pdeathsig when the thread that started the child ends
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
			close(p.ended)
		}
	}()
	if err := <-started; err != nil {
		m.t.Fatal(err)
	}
	return p
}

func eventually(t *testing.T, within time.Duration, what string, ready func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	for err := ready(); err != nil; err = ready() {
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			t.Fatalf("%s: not within %s: %v", what, within, err)
		}
	}
}
