// Package swtpm runs swtpm, a TPM emulator, and ends it.
package swtpm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// ErrMissing says that swtpm is not installed.
var ErrMissing = errors.New("swtpm is not installed; install the package swtpm (apt-get install swtpm)")

const (
	startTimeout = time.Minute // swtpm needs some 20 ms, its first start some 50
	stopTimeout  = 30 * time.Second
)

// Paths are the files of one TPM.
type Paths struct {
	State   string // the folder with the TPM's state
	Socket  string // the socket for TPM commands
	Control string // the control socket
	Log     string
}

// Process is a running swtpm.
type Process struct {
	paths Paths
	pid   *os.Process
	ended chan struct{} // closed when swtpm has ended
}

// Start starts swtpm and returns once it answers. The TPM has then been reset and
// started (TPM2_Startup(CLEAR)). swtpm ends with this process, even if this process is
// killed. swtpm keeps lock open, so the folder stays locked while anything uses it. The
// error is [ErrMissing] if swtpm is missing.
func Start(ctx context.Context, paths Paths, lock *os.File) (*Process, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	binary, err := exec.LookPath("swtpm")
	if err != nil {
		return nil, ErrMissing
	}
	if err := os.Remove(paths.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	p := &Process{paths: paths, ended: make(chan struct{})}
	listener, err := listen(paths.Control)
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	cmd := exec.Command(binary, "socket", "--tpm2",
		"--tpmstate", "dir="+paths.State+",mode=0600",
		"--server", "type=unixio,path="+paths.Socket+",mode=0600",
		"--ctrl", "type=unixio,fd=3",
		"--flags", "not-need-init,startup-clear",
		"--log", "file="+paths.Log+",truncate")
	cmd.ExtraFiles = []*os.File{listener, lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	if err := p.run(cmd); err != nil {
		return nil, fmt.Errorf("start swtpm: %w", err)
	}
	listener.Close() // otherwise nobody would notice the end of swtpm
	if err := p.ping(ctx); err != nil {
		_ = p.Stop()
		return nil, p.explain(err)
	}
	return p, nil
}

// listen makes the control socket. This process listens before swtpm runs, so a
// connection needs no retries: it waits until swtpm serves it.
func listen(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	return l.File()
}

// run starts cmd and waits for its end in the background. The parent-death signal comes
// when the thread that started the child ends, so run keeps one thread for that.
func (p *Process) run(cmd *exec.Cmd) error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := cmd.Start()
		p.pid = cmd.Process
		started <- err
		if err == nil {
			_ = cmd.Wait()
			close(p.ended)
		}
	}()
	return <-started
}

// ping waits until swtpm answers on its control channel (CMD_GET_CAPABILITY of
// swtpm_ioctls(3)), after which its TPM socket exists.
func (p *Process) ping(ctx context.Context) error {
	const getCapability = 1
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", p.paths.Control)
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := conn.Write(binary.BigEndian.AppendUint32(nil, getCapability)); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, make([]byte, 8))
	return err
}

// explain adds the end of swtpm's log.
func (p *Process) explain(err error) error {
	b, readErr := os.ReadFile(p.paths.Log)
	if lines := bytes.TrimSpace(b); readErr == nil && len(lines) > 0 {
		last := lines[bytes.LastIndexByte(lines, '\n')+1:]
		err = fmt.Errorf("%w; it says %q", err, bytes.TrimSpace(last))
	}
	return fmt.Errorf("swtpm does not start: %w; see %s, or begin with another folder, which is another TPM", err, p.paths.Log)
}

// Stop ends swtpm by SIGTERM, so that swtpm leaves its state in order.
func (p *Process) Stop() error {
	_ = p.pid.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
		return nil
	case <-time.After(stopTimeout):
		p.Kill()
		return fmt.Errorf("swtpm (pid %d) did not end within %v and was killed", p.pid.Pid, stopTimeout)
	}
}

// Kill ends swtpm as a power failure ends a TPM.
func (p *Process) Kill() {
	_ = p.pid.Kill()
	<-p.ended
}
