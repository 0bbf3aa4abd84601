package leaks

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestNoCore: no matter what ends serve during a rotation, and how large a core file
// its limits allow, the kernel writes no core file and pipes none to a collector. The
// runtime's dump of all stacks holds no key.
func TestNoCore(t *testing.T) {
	t.Parallel()
	l := begin(t)
	unlimitedCores(t)
	for _, s := range []syscall.Signal{syscall.SIGQUIT, syscall.SIGABRT, syscall.SIGSEGV, syscall.SIGBUS} {
		// The runtime raises the signal again after it has printed the stacks.
		l.start("GOTRACEBACK=crash")
		l.waitOpen()
		if err := l.seed("before " + s.String()); err != nil {
			t.Fatal(err)
		}
		l.crashAmid(s)
		status := l.serve.ProcessState.Sys().(syscall.WaitStatus)
		if !status.Signaled() || status.CoreDump() {
			t.Errorf("%v: %v, core dumped: %v; want an end by the signal and no core", s, l.serve.ProcessState, status.CoreDump())
		}
		if found, err := filepath.Glob(l.path("core*")); err != nil || len(found) > 0 {
			t.Errorf("%v leaves %v, %v", s, found, err)
		}
	}
	if n := bytes.Count(l.log(), []byte("(*Wrapper).seal(")); n < 4 {
		t.Errorf("%d stacks with a sealing in progress were printed, want 4", n)
	}
	for _, name := range l.secrets.in(l.log()) {
		t.Errorf("%s is among what the runtime printed", name)
	}
}

// crashAmid ends serve while it waits for the TPM to seal a fresh KEK, which is then on
// the stack and the heap. The test searches for the former KEK, which the rotation
// handles too, because nobody outside ever learns the fresh one.
func (l *life) crashAmid(s syscall.Signal) {
	l.t.Helper()
	l.proxy.Forget()
	l.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCCreate, Do: tpmtest.Hang})
	defer l.proxy.Heal()
	rotate := l.command("rotate")
	if err := rotate.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.eventually("serve seals", func() error {
		if l.proxy.Count(tpm2.TPMCCCreate) == 0 {
			return errors.New("no TPM2_Create")
		}
		return nil
	})
	_ = l.stop(s)
	if rotate.Wait() == nil {
		l.t.Error("the rotation ended well")
	}
}

// unlimitedCores lets this process and its children write cores of any size, and proves
// that the kernel would do so.
func unlimitedCores(t *testing.T) {
	t.Helper()
	var before unix.Rlimit
	unlimited := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	if err := unix.Prlimit(0, unix.RLIMIT_CORE, &unlimited, &before); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Prlimit(0, unix.RLIMIT_CORE, &before, nil) })
	cmd := exec.Command("sleep", "1h")
	cmd.Dir = t.TempDir()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Process.Signal(syscall.SIGQUIT)
	_ = cmd.Wait() // the status tells all
	if !cmd.ProcessState.Sys().(syscall.WaitStatus).CoreDump() {
		t.Fatal("here no process writes a core, so that kleidi writes none proves nothing; see kernel.core_pattern")
	}
}

// TestUndumpable: another process of the same user, not root, can't look into kleidi.
// kleidi's files in /proc belong to root, as proc(5) says of a process that is not
// dumpable.
func TestUndumpable(t *testing.T) {
	t.Parallel()
	const nobody = 65534
	dir, err := os.MkdirTemp("", "leaks")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	binary := filepath.Join(dir, "kleidi")
	// Not os.WriteFile: a child of another test, forked meanwhile, would hold it open for writing (ETXTBSY)
	if out, err := exec.Command("install", "-m", "755", node.Binary(t), binary).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	config := "apiVersion: kleidi.beezy.dev/v1alpha1\nkind: KleidiConfiguration\n" +
		"state: {dir: DIR/state}\nkms: {socket: DIR/kms.sock}\nadmin: {socket: DIR/admin.sock}\nhttp: {socket: \"\"}\n"
	if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(strings.ReplaceAll(config, "DIR", dir)), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{os.Chown(dir, nobody, nobody), os.Chmod(dir, 0o755)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	serve := exec.Command(binary, "serve", "--config", filepath.Join(dir, "config.yaml"))
	log, err := serve.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	serve.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = serve.Process.Kill(); _ = serve.Wait() })
	var said bytes.Buffer
	for line := make([]byte, 4096); !strings.Contains(said.String(), "starting"); {
		n, err := log.Read(line)
		if said.Write(line[:n]); err != nil {
			t.Fatalf("serve ends: %v\n%s", err, &said)
		}
	}
	proc := filepath.Join("/proc", strconv.Itoa(serve.Process.Pid))
	if uid := owner(t, proc); uid != nobody && uid != 0 {
		t.Fatalf("serve runs as %d", uid)
	}
	for _, name := range []string{"environ", "maps", "mem", "fd"} {
		if uid := owner(t, filepath.Join(proc, name)); uid != 0 {
			t.Errorf("%s of kleidi belongs to %d: the process is dumpable", name, uid)
		}
	}
	limits, err := os.ReadFile(filepath.Join(proc, "limits"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(limits)) {
		if f := strings.Fields(line); strings.HasPrefix(line, "Max core file size") && (f[4] != "0" || f[5] != "0") {
			t.Errorf("%s", line)
		}
	}
}

func owner(t *testing.T, path string) uint32 {
	t.Helper()
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		t.Fatal(err)
	}
	return stat.Uid
}
