package cluster

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// TestExistingCluster brings kleidi into a cluster that stores its Secrets in clear, and
// out of it again, as docs/operations.md says.
func TestExistingCluster(t *testing.T) {
	t.Parallel()
	n := NewKubeNode(t, KubeNodeSetup{Name: "cp-1", Address: "10.99.0.1"})
	commands := Readme(t)
	n.ShFor(15*time.Minute, "kubeadm init --config /root/kubeadm.yaml")
	n.create("lab")
	inClear(t, n)

	n.Sh("mkdir -p /media/usb")
	n.CopyPackage()
	n.Sh(commands[0])
	n.Configure("")
	initialise(t, n, commands[1])
	n.Sh(commands[2])
	n.ShFor(15*time.Minute, commands[3]) // it waits for kube-apiserver
	if out, err := n.Try("kleidi usage"); err == nil {
		t.Errorf("a Secret is in clear, and kleidi usage is content: %s", out)
	}
	migrate(t, n, commands[4])
	n.Sh(commands[5] + "; kleidi usage; kleidi doctor")
	allEncrypted(t, n)
	readable(t, n)

	const file = "/etc/kubernetes/kleidi-encryption.yaml"
	if out, err := n.Try("kleidi kubeadm patch --revert"); err == nil {
		t.Errorf("reverted while Secrets are encrypted: %s", out)
	}
	// One kube-apiserver can take the second step at once: no other would have to read what it
	// writes.
	n.Sh("kleidi encryption-config --from=" + file + " --to=identity --step=2")
	n.StopPod("kube-apiserver")
	n.StartPod("kube-apiserver")
	readable(t, n)
	n.Sh("kleidi migrate --by patch --encryption-config=" + file + "; kleidi usage --encryption-config=" + file)
	n.Sh("kleidi encryption-config --from=" + file + " --to=identity --step=3; kleidi kubeadm patch --revert")
	reverted(t, n)
	n.Sh("systemctl disable -q --now kleidi")
	inClear(t, n)
	readable(t, n)
}

// inClear: the Secret is in clear in etcd.
func inClear(t *testing.T, n *KubeNode) {
	t.Helper()
	if value := n.Stored(labKey)[labKey]; !bytes.Contains(value, []byte(password)) {
		t.Errorf("the Secret is stored as %q", value)
	}
}

// reverted waits for the kube-apiserver without kleidi.
func reverted(t *testing.T, n *KubeNode) {
	t.Helper()
	node.Eventually(t, 10*time.Minute, "kubelet has restarted kube-apiserver", func() error {
		if out, err := n.Try("pgrep -f '^kube-apiserver.*encryption-provider-config'"); err == nil {
			return errors.New("it still has the flag, process " + out)
		}
		out, err := n.TryKubectl("get --raw /readyz")
		if err != nil {
			return errors.New(out)
		}
		return nil
	})
}
