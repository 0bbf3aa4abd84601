package cluster

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// provider is how kube-apiserver's values begin in etcd if kleidi has sealed their seed.
const provider = "k8s:enc:kms:v2:kleidi:"

// TestSixCommands leads from the package to an encrypted Secret on a node of kubeadm, as
// README says.
func TestSixCommands(t *testing.T) {
	t.Parallel()
	settings := machineSettings(t)
	lap := stopwatch(t)
	n := NewKubeNode(t, KubeNodeSetup{Name: "cp-1", Address: "10.99.0.1"})
	lap("node")
	commands := Readme(t)
	n.CopyPackage()
	n.Sh("mkdir -p /media/usb")
	lap("package")

	n.Sh(commands[0])
	n.Configure("")
	initialise(t, n, commands[1])
	n.Sh(commands[2] + "; kleidi status")
	n.Sh("kleidi kubeadm patch --dir /etc/kubernetes/patches")
	n.Write("root/kubeadm.yaml", n.Config("patches: {directory: /etc/kubernetes/patches}", ""))
	n.ShFor(15*time.Minute, "kubeadm init --config /root/kubeadm.yaml")
	lap("kubeadm init")
	n.create("lab")
	lap("Secret")
	migrate(t, n, commands[4])
	lap("rewritten")
	n.Sh(commands[5] + "; kleidi usage; kleidi doctor")
	lap("looked over")

	allEncrypted(t, n)
	n.Write("root/upgrade.yaml", upgradeConfiguration(t)+"  ignorePreflightErrors: [SystemVerification]\n")
	n.ShFor(15*time.Minute, "kubeadm upgrade node --config upgrade.yaml")
	lap("kubeadm upgrade")
	readable(t, n)
	n.create("upgraded")
	allEncrypted(t, n)
	if now := machineSettings(t); now != settings {
		t.Errorf("kubelet has changed the machine's settings from\n%s\nto\n%s", settings, now)
	}
}

// upgradeConfiguration returns the file of docs/operations.md. It ends with the settings of
// kubeadm upgrade node.
func upgradeConfiguration(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	const begin = "kind: UpgradeConfiguration\n"
	_, settings, found := strings.Cut(string(b), begin)
	if !found {
		t.Fatal("docs/operations.md has no UpgradeConfiguration")
	}
	settings, _, _ = strings.Cut(settings, "```")
	return "apiVersion: kubeadm.k8s.io/v1beta4\n" + begin + settings
}

// migrate runs kleidi migrate, which gives up after 5 minutes without a beginning.
func migrate(t *testing.T, n *KubeNode, command string) {
	t.Helper()
	node.Again(t, 30*time.Minute, "the Secrets are rewritten", func() error {
		out, err := n.TryFor(15*time.Minute, command)
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}, "has not begun with StorageVersionMigration")
}

// readable waits until kube-apiserver decrypts the Secret.
func readable(t *testing.T, n *KubeNode) {
	t.Helper()
	node.Eventually(t, 10*time.Minute, "the Secret is read", func() error {
		out, err := n.TryKubectl("get secret lab -o 'go-template={{.data.password | base64decode}}'")
		if err != nil || out != password {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// allEncrypted: all Secrets are encrypted by kleidi in etcd.
func allEncrypted(t *testing.T, n *KubeNode) {
	t.Helper()
	secrets := n.Stored("/registry/secrets/")
	if _, ok := secrets[labKey]; !ok {
		t.Errorf("the Secret is not in etcd, but %q", slices.Sorted(maps.Keys(secrets)))
	}
	for key, value := range secrets {
		if !bytes.HasPrefix(value, []byte(provider)) || bytes.Contains(value, []byte(password)) {
			t.Errorf("%s begins with %q", key, value[:min(len(value), 40)])
		}
	}
}

// labKey is the Secret's key in etcd.
const labKey = "/registry/secrets/default/lab"

// initialise runs kleidi init, and gives the recovery identity back, as its operator would.
func initialise(t *testing.T, n *KubeNode, command string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := n.Command(ctx, command)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if identity := strings.TrimSpace(lines.Text()); strings.HasPrefix(identity, "AGE-SECRET-KEY-") {
			fmt.Fprintln(in, identity)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, said.Bytes())
	}
}

// machineSettings returns the kernel settings of this machine that a kubelet would set.
func machineSettings(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	for _, m := range regexp.MustCompile(`(?m)^pretend (\S+)`).FindAllStringSubmatch(containerSettings, -1) {
		b, err := os.ReadFile("/proc/sys/" + m[1])
		if err != nil {
			t.Fatal(err)
		}
		all.WriteString(m[1] + " " + string(b))
	}
	return all.String()
}

// stopwatch logs how long the parts of a test take.
func stopwatch(t *testing.T) func(part string) {
	start := time.Now()
	return func(part string) {
		t.Logf("%s: %s", part, time.Since(start).Round(100*time.Millisecond))
		start = time.Now()
	}
}
