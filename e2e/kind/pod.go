package kind

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// deploy is the folder of the files, seen from a suite.
const deploy = "../../deploy/kind"

// Pod is the root folder of the pod. What the real pod has on its node stays in the folder
// from one start to the next.
type Pod struct {
	Root string

	t       testing.TB
	kleidi  string
	running *node.Process
}

// NewPod makes the root folder, with the files of a variant of deploy/kind.
func NewPod(t testing.TB, variant string) *Pod {
	t.Helper()
	p := &Pod{Root: t.TempDir(), t: t, kleidi: filepath.Join(t.TempDir(), "kleidi")}
	p.must(exec.Command("env", "CGO_ENABLED=1", "go", "build", "-o", p.kleidi, "../../cmd/kleidi"))
	for _, folder := range []string{"usr", "dev", "proc", "tmp", "etc", "run/kleidi", "var/lib/kleidi", "kind"} {
		if err := os.MkdirAll(p.Path(folder), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, folder := range []string{"bin", "lib", "lib64", "sbin"} {
		if err := os.Symlink("usr/"+folder, p.Path(folder)); err != nil {
			t.Fatal(err)
		}
	}
	for from, to := range map[string]string{
		"/etc/passwd": "etc", "/etc/group": "etc", "/etc/ld.so.cache": "etc", "/etc/nsswitch.conf": "etc",
		filepath.Join(deploy, "start"): "", filepath.Join(deploy, variant): "kind/kleidi", p.kleidi: "",
	} {
		p.must(exec.Command("cp", "-r", from, p.Path(to)))
	}
	t.Cleanup(func() {
		if p.running == nil {
			return
		}
		// With the first process all others end before unshare does, so nothing writes files
		// while the test's folder is removed.
		if first, err := p.first(); err != nil || exec.Command("kill", "-9", first).Run() != nil {
			p.running.Kill()
		}
		p.running.Wait()
	})
	return p
}

// Path names a file of the pod.
func (p *Pod) Path(name string) string { return filepath.Join(p.Root, name) }

func (p *Pod) must(c *exec.Cmd) string {
	p.t.Helper()
	out, err := c.CombinedOutput()
	if err != nil {
		p.t.Fatalf("%s: %v\n%s", c, err, out)
	}
	return string(out)
}

// Start starts the container, and waits until kleidi is open.
func (p *Pod) Start() {
	p.t.Helper()
	p.running = node.Start(p.t, p.Path("log"), "unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", `
cd "$0"
for folder in usr dev; do mount --rbind "/$folder" "$folder"; done
mount -t proc proc proc
exec chroot . setpriv --no-new-privs --bounding-set=-all,+dac_override,+chown,+ipc_lock /bin/sh /start
`, p.Root)
	node.Eventually(p.t, 5*time.Minute, "kleidi is open", func() error {
		if err := p.running.Alive(); err != nil {
			p.t.Fatal(err)
		}
		if said, err := p.kleidiIn("status", "--quick"); err != nil {
			return fmt.Errorf("%w: %s", err, said)
		}
		return nil
	})
}

// Kleidi runs kleidi in the container, as kubectl exec does.
func (p *Pod) Kleidi(args ...string) string {
	p.t.Helper()
	said, err := p.kleidiIn(args...)
	if err != nil {
		p.t.Fatalf("kleidi %s: %v\n%s", strings.Join(args, " "), err, said)
	}
	return said
}

func (p *Pod) kleidiIn(args ...string) (string, error) {
	first, err := p.first()
	if err != nil {
		return "", err
	}
	out, err := exec.Command("nsenter", append([]string{"--target", first, "--mount", "--pid", "--root", "--wdns=/", "/kleidi"}, args...)...).CombinedOutput()
	return string(out), err
}

// first returns the container's first process, which is the only child of unshare.
func (p *Pod) first() (string, error) {
	pid := p.running.Pid()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return "", err
	}
	if child := strings.TrimSpace(string(b)); child != "" {
		return child, nil
	}
	return "", fmt.Errorf("process %d has no child", pid)
}

// Stop ends the container as a kubelet does: its first process gets the signal, and with
// that process all others end.
func (p *Pod) Stop(s syscall.Signal) {
	p.t.Helper()
	first, err := p.first()
	if err != nil {
		p.t.Fatal(err)
	}
	p.must(exec.Command("kill", fmt.Sprintf("-%d", s), first))
	p.running.Wait()
}
