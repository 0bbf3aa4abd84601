package node

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Process is a server that logs into a file. The log is shown if the test fails.
type Process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
}

// Start runs a server, which ends with the test.
func Start(t testing.TB, log, binary string, args ...string) *Process {
	t.Helper()
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := &Process{cmd: exec.Command(binary, args...), log: log, done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = f, f
	// A test that panics leaves no server behind.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go p.run(started)
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("%s:\n%s", filepath.Base(log), tail(log, 60))
		}
	})
	return p
}

func (p *Process) run(started chan<- error) {
	// The kernel sends Pdeathsig when the thread that started the child ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(p.done)
	err := p.cmd.Start()
	started <- err
	if err == nil {
		_ = p.cmd.Wait() // the state tells everything
	}
}

// Alive fails if the server has ended.
func (p *Process) Alive() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s ended: %s\n%s", filepath.Base(p.cmd.Path), p.cmd.ProcessState, tail(p.log, 20))
	default:
		return nil
	}
}

// Stop asks the server to end, as systemd would, and waits for it.
func (p *Process) Stop() { p.signal(syscall.SIGTERM) }

// Kill ends the server as a crash would.
func (p *Process) Kill() { p.signal(syscall.SIGKILL) }

// Wait waits for the end of the server.
func (p *Process) Wait() { <-p.done }

// Pid returns the number of the server's process.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Freeze stops the server in the middle of its work, until Thaw. It returns once all threads
// have stopped.
func (p *Process) Freeze() {
	_ = p.cmd.Process.Signal(syscall.SIGSTOP)
	_ = unix.Waitid(unix.P_PID, p.Pid(), nil, unix.WSTOPPED|unix.WEXITED|unix.WNOWAIT, nil)
}

// Thaw lets the server go on.
func (p *Process) Thaw() { _ = p.cmd.Process.Signal(syscall.SIGCONT) }

func (p *Process) signal(s os.Signal) {
	_ = p.cmd.Process.Signal(s) // an error means that the server has ended, as intended
	<-p.done
}

func tail(file string, lines int) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Listener makes a unix socket, on which a server with this file listens once it runs. A
// server that makes the socket itself has it in place before it listens.
func Listener(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	return l.File()
}

// Ports that the kernel never assigns to a connection (its own begin at 32768).
const firstPort, lastPort = 20000, 32000

// FreePort returns a TCP port on which nothing listens. A lock, shared by all processes
// of this machine, keeps other tests from the port until this test has ended.
func FreePort(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(os.TempDir(), "kleidi-test-ports")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for range lastPort - firstPort {
		port := strconv.Itoa(firstPort + rand.IntN(lastPort-firstPort))
		f, err := os.OpenFile(filepath.Join(dir, port), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil && free(port) {
			t.Cleanup(func() { f.Close() })
			return port
		}
		f.Close()
	}
	t.Fatal("no TCP port is free")
	return ""
}

func free(port string) bool {
	l, err := net.Listen("tcp", "127.0.0.1:"+port)
	if err != nil {
		return false
	}
	return l.Close() == nil
}
