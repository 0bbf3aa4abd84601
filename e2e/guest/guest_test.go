package guest

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/nspawn"
)

const password = "correct-horse-battery"

// TestKubeadm leads from the package to an encrypted Secret, by README's six commands, on a
// machine that measures its boot into its TPM; then through a reboot; then to the static pod
// in place of the unit.
func TestKubeadm(t *testing.T) {
	commands := cluster.Readme(t)
	m := bootNode(t)
	m.Sh(commands[0])
	// the identity is written to a pipe only, and asked for again
	m.Sh("set -o pipefail; mkfifo in; exec 9<>in; " + commands[1] + ` <in | while read -r line; do
	case $line in AGE-SECRET-KEY-*) echo "$line" >&9 ;; esac
done; rm in`)
	m.Sh(commands[2])
	opens(m)
	m.Sh("kleidi kubeadm patch --dir /etc/kubernetes/patches")
	m.ShFor(40*time.Minute, "kubeadm init --config /root/kubeadm.yaml")
	m.Sh(kubectl + "create secret generic lab --from-literal=password=" + password)
	m.ShFor(30*time.Minute, commands[4])
	m.Sh(commands[5] + "; kleidi usage")
	stored(m)
	if out, err := m.TryFor(20*time.Minute, "kleidi doctor"); err != nil {
		t.Errorf("kleidi doctor: %v\n%s", err, out)
	}
	// what CI's containers can't have
	out := m.Sh("pid=$(systemctl show -P MainPID kleidi); grep VmLck /proc/$pid/status; cat /proc/$pid/oom_score_adj; systemctl show -p LimitMEMLOCK kleidi; stat -fc %T /sys/fs/cgroup")
	for _, want := range []string{"LimitMEMLOCK=infinity", "\n-900\n", "cgroup2fs"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.Contains(out, "VmLck:\t       0 kB") {
		t.Errorf("no memory is locked:\n%s", out)
	}

	m.reboot()
	opens(m)
	readable(m)

	m.Sh("systemctl disable -q --now kleidi; cp static-pod.yaml /etc/kubernetes/manifests/kleidi.yaml")
	opens(m)
	readable(m)
	if out := m.Sh("ctr -n k8s.io containers list"); !strings.Contains(out, "localhost/kleidi:node") {
		t.Errorf("kleidi is no container:\n%s", out)
	}
}

const kubectl = "kubectl --kubeconfig=/etc/kubernetes/admin.conf --request-timeout=60s "

// bootNode boots a node of kubeadm without kleidi. A static pod's manifest and image are
// there.
func bootNode(t *testing.T) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("", "guest") // sockets need a short path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	begin := time.Now()
	// The root folder is made in a container, where containerd takes the images in quickly.
	n := cluster.NewKubeNode(t, cluster.KubeNodeSetup{Name: "cp-1", Address: "10.99.0.1"})
	n.CopyPackage()
	n.Copy("../../deploy/static-pod/kleidi.yaml", "root/static-pod.yaml")
	n.Import(cluster.Image{Reference: "localhost/kleidi:node", Binary: node.Binary(t), Path: "/kleidi", Entrypoint: []string{"/kleidi"}})
	n.LeaveContainer()
	n.Write("root/kubeadm.yaml", n.Config("patches: {directory: /etc/kubernetes/patches}\n"+slow, ""))
	n.Write("usr/local/sbin/agent", agentScript)
	n.Write("etc/systemd/system/agent.service", agentUnit)
	n.Write("etc/modules-load.d/node.conf", "overlay\nbr_netfilter\n")
	n.Write("etc/fstab", "")
	nspawn.Run(t, "sh", "-euc", `cd "$1"; chmod 0755 usr/local/sbin/agent; mkdir -p media/usb etc/systemd/system/multi-user.target.wants
ln -s ../agent.service etc/systemd/system/multi-user.target.wants/agent.service`, "-", n.Path("/"))
	m := newMachine(t, dir)
	nspawn.Run(t, "./disk", n.Path("/"), m.path("disk"))
	t.Logf("disk: %s", time.Since(begin).Round(time.Second))
	m.boot()
	return m
}

// slow gives an emulated CPU time.
const slow = "timeouts: {controlPlaneComponentHealthCheck: 30m0s, kubernetesAPICall: 10m0s, etcdAPICall: 10m0s, kubeletHealthCheck: 10m0s, tlsBootstrap: 10m0s}"

// opens waits until kleidi is open.
func opens(m *machine) {
	m.t.Helper()
	eventually(m.t, 30*time.Minute, "kleidi is open", func() error {
		if out, err := m.TryFor(5*time.Minute, "kleidi status"); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// readable waits until kube-apiserver decrypts the Secret.
func readable(m *machine) {
	m.t.Helper()
	eventually(m.t, 30*time.Minute, "the Secret is read", func() error {
		out, err := m.TryFor(5*time.Minute, kubectl+"get secret lab -o 'go-template={{.data.password | base64decode}}'")
		if err != nil || out != password {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// stored: etcd's file has values that kleidi's KEK protects, and no password.
func stored(m *machine) {
	m.t.Helper()
	m.Sh("grep -q k8s:enc:kms:v2:kleidi: /var/lib/etcd/member/snap/db; ! grep -q " + password + " /var/lib/etcd/member/snap/db")
}
