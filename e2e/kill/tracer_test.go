package kill

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// traced is a process whose durable steps are counted. It can be killed before one of
// them.
type traced struct {
	t      testing.TB
	dir    string // steps in this folder count
	output string // file that holds stdout and stderr
	pid    int
	free   bool // the process runs freely: no step is counted
	done   chan struct{}

	mu     sync.Mutex
	steps  []step
	victim victim
	killed bool
	status unix.WaitStatus
}

// step is a system call that changes what a crash leaves behind.
type step struct {
	series string // flush, rename, link, unlink, create, write or TPM
	what   string
}

// tpm reports whether the step is a command to the TPM rather than a step on the disk.
func (s step) tpm() bool { return s.series == "TPM" }

// group is a group of steps for counting. Steps on the disk and TPM commands are
// counted separately, so that a TPM command, which serve may send at any time, shifts
// no step on the disk.
type group string

const (
	onDisk group = "step on the disk"
	inName group = "step that gives, changes or removes a file's name"
	inTPM  group = "TPM command"
	inNV   group = "TPM command that lasts, or after one" // so that a kill comes before and after it
)

// lasting are the TPM commands that change the TPM's NV memory: TPM2_NV_UndefineSpace,
// TPM2_NV_DefineSpace, TPM2_NV_Increment and TPM2_NV_Write (TPM 2.0 Library, Part 2,
// 6.5.2).
var lasting = []step{{"TPM", "0x122"}, {"TPM", "0x12a"}, {"TPM", "0x134"}, {"TPM", "0x137"}}

// count counts the steps of the group, and reports whether the last step belongs to it.
func (g group) count(steps []step) (n int, last bool) {
	afterLasting := false
	for _, s := range steps {
		isLasting := slices.Contains(lasting, s)
		switch g {
		case onDisk:
			last = !s.tpm()
		case inName:
			last = slices.Contains([]string{"rename", "link", "unlink"}, s.series)
		case inTPM:
			last = s.tpm()
		case inNV:
			last = isLasting || s.tpm() && afterLasting
		}
		if s.tpm() {
			afterLasting = isLasting
		}
		if last {
			n++
		}
	}
	return n, last
}

// victim is the step before which the process dies: the n-th of a group, or none if 0.
type victim struct {
	group
	n int
}

func (v victim) String() string { return fmt.Sprintf("%s %d", v.group, v.n) }

func (s step) String() string { return s.series + " " + s.what }

// trace starts a process and counts its steps in dir. The process is killed before one
// of them.
func trace(t testing.TB, dir, output string, victim victim, cmd *exec.Cmd) *traced {
	t.Helper()
	p := &traced{t: t, dir: dir, output: output, victim: victim, done: make(chan struct{})}
	p.start(cmd)
	return p
}

// release starts a process without counting its steps: counting costs two stops for
// each step.
func release(t testing.TB, output string, cmd *exec.Cmd) *traced {
	t.Helper()
	p := &traced{t: t, output: output, free: true, done: make(chan struct{})}
	p.start(cmd)
	return p
}

func (p *traced) start(cmd *exec.Cmd) {
	t := p.t
	t.Helper()
	f, err := os.OpenFile(p.output, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	// A separate process group, so that waiting for it reaps no other child.
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: !p.free, Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go p.run(cmd, started)
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
}

// arm restarts the count.
func (p *traced) arm(victim victim) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.steps, p.victim = nil, victim
}

func (p *traced) kill() {
	p.signal(unix.SIGKILL)
	<-p.done
}

// signal does nothing once the process has ended, because another process may have its
// number.
func (p *traced) signal(s unix.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.done:
	default:
		_ = unix.Kill(p.pid, s)
	}
}

// reached returns the steps that were reached. If the process was killed before the
// last one, that step did not happen.
func (p *traced) reached() (steps []step, killed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.steps, p.killed
}

// wait returns when the process has ended.
func (p *traced) wait() (ok bool) {
	<-p.done
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status.Exited() && p.status.ExitStatus() == 0
}

// alive fails when the process has ended.
func (p *traced) alive() error {
	select {
	case <-p.done:
		return fmt.Errorf("kleidi has ended: %s", p.said())
	default:
		return nil
	}
}

func (p *traced) said() string {
	b, err := os.ReadFile(p.output)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// run is the tracer: one thread, which receives all stops.
func (p *traced) run(cmd *exec.Cmd, started chan<- error) {
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	if err := cmd.Start(); err != nil {
		started <- err
		return
	}
	p.pid = cmd.Process.Pid
	var err error
	if !p.free {
		err = p.attach()
	}
	started <- err
	if err != nil { // the test has ended with it
		_ = unix.Kill(p.pid, unix.SIGKILL)
		close(p.done)
		return
	}
	for err == nil {
		err = p.next()
	}
	if !errors.Is(err, errEnded) {
		_ = unix.Kill(p.pid, unix.SIGKILL)
		p.t.Errorf("trace: %v", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.done)
	_ = cmd.Process.Release()
}

// attach makes the process, which stops before its first instruction, stop at each
// system call.
func (p *traced) attach() error {
	var status unix.WaitStatus
	if _, err := unix.Wait4(p.pid, &status, 0, nil); err != nil {
		return err
	}
	if err := unix.PtraceSetOptions(p.pid, unix.PTRACE_O_TRACESYSGOOD|unix.PTRACE_O_TRACECLONE|unix.PTRACE_O_TRACEFORK|
		unix.PTRACE_O_TRACEVFORK|unix.PTRACE_O_EXITKILL); err != nil {
		return err
	}
	return unix.PtraceSyscall(p.pid, 0)
}

var errEnded = errors.New("the process has ended")

// sysgood marks the stop at a system call (PTRACE_O_TRACESYSGOOD).
const sysgood = unix.SIGTRAP | 0x80

// next handles one stop of one thread.
func (p *traced) next() error {
	var status unix.WaitStatus
	tid, err := unix.Wait4(-p.pid, &status, unix.WALL|unix.WNOTHREAD, nil)
	if errors.Is(err, unix.EINTR) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("wait4: %w", err)
	}
	if !status.Stopped() {
		if tid != p.pid {
			return nil // a thread ended
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.status = status
		return errEnded
	}
	deliver := 0
	switch sig := status.StopSignal(); sig {
	case sysgood:
		if p.condemned(tid) {
			return unix.Kill(p.pid, unix.SIGKILL)
		}
	case unix.SIGTRAP, unix.SIGSTOP: // a clone, and the new thread
	default:
		deliver = int(sig)
	}
	if err := unix.PtraceSyscall(tid, deliver); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("PTRACE_SYSCALL: %w", err)
	}
	return nil
}

// condemned reports whether the thread has stopped before the step at which the process
// is to die.
func (p *traced) condemned(tid int) bool {
	call, entry := syscallOf(tid)
	if !entry {
		return false
	}
	s, ok := p.stepOf(tid, call)
	if !ok {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.killed {
		return false
	}
	p.steps = append(p.steps, s)
	n, last := p.victim.count(p.steps)
	p.killed = last && n == p.victim.n
	return p.killed
}

// call is a system call that a thread is about to make.
type call struct {
	nr   uint64
	args [6]uint64
}

// syscallOf returns the system call at which the thread stopped: struct
// ptrace_syscall_info of ptrace(2), which is the same on every architecture.
func syscallOf(tid int) (c call, entry bool) {
	const stopEntry = 1
	var info struct {
		op     uint8
		_      [3]uint8
		arch   uint32
		ip, sp uint64
		call
		_ [32]byte
	}
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(tid),
		unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	return info.call, errno == 0 && info.op == stopEntry
}

// stepOf reports whether a call is a durable step.
func (p *traced) stepOf(tid int, c call) (step, bool) {
	switch c.nr {
	case unix.SYS_FSYNC, unix.SYS_FDATASYNC:
		return p.inDir("flush", fdPath(tid, c.args[0]))
	case unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2:
		return p.inDir("rename", readPath(tid, c.args[3]))
	case unix.SYS_LINKAT:
		return p.inDir("link", readPath(tid, c.args[3]))
	case unix.SYS_UNLINKAT:
		return p.inDir("unlink", readPath(tid, c.args[1]))
	case unix.SYS_MKDIRAT:
		return p.inDir("create", readPath(tid, c.args[1]))
	case unix.SYS_OPENAT:
		if c.args[2]&(unix.O_CREAT|unix.O_TRUNC) == 0 {
			return step{}, false
		}
		return p.inDir("create", readPath(tid, c.args[1]))
	case unix.SYS_FTRUNCATE:
		return p.inDir("write", fdPath(tid, c.args[0]))
	case unix.SYS_WRITE, unix.SYS_PWRITE64, unix.SYS_SENDTO:
		if code, ok := tpmCommand(tid, c); ok {
			return step{"TPM", fmt.Sprintf("%#x", code)}, true
		}
		return p.inDir("write", fdPath(tid, c.args[0]))
	}
	return step{}, false
}

func (p *traced) inDir(series, path string) (step, bool) {
	if path != p.dir && !strings.HasPrefix(path, p.dir+"/") {
		return step{}, false
	}
	return step{series, filepath.Base(path)}, true
}

func fdPath(tid int, fd uint64) string {
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", tid, int32(fd)))
	if err != nil {
		return ""
	}
	return path
}

// tpmCommand recognises a TPM command by its header: a tag, the total length, and a
// code (TPM 2.0 Library, Part 1, 18.2).
func tpmCommand(tid int, c call) (code uint32, ok bool) {
	const header = 10
	if c.args[2] < header || c.args[2] > 4096 {
		return 0, false
	}
	b := readMemory(tid, c.args[1], header)
	if len(b) < header || b[0] != 0x80 || b[1] != 1 && b[1] != 2 || uint64(binary.BigEndian.Uint32(b[2:])) != c.args[2] {
		return 0, false
	}
	return binary.BigEndian.Uint32(b[6:]), true
}

func readPath(tid int, addr uint64) string {
	b := readMemory(tid, addr, 256)
	path, _, _ := bytes.Cut(b, []byte{0})
	return string(path)
}

func readMemory(tid int, addr uint64, n int) []byte {
	b := make([]byte, n)
	local := []unix.Iovec{{Base: &b[0]}}
	local[0].SetLen(n)
	// One page at a time: a path may end right before an unmapped page.
	var remote []unix.RemoteIovec
	for at, end := uintptr(addr), uintptr(addr)+uintptr(n); at < end; {
		next := min(end, (at/4096+1)*4096)
		remote = append(remote, unix.RemoteIovec{Base: at, Len: int(next - at)})
		at = next
	}
	read, err := unix.ProcessVMReadv(tid, local, remote, 0)
	if err != nil {
		return nil
	}
	return b[:read]
}
