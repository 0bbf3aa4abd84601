package doctor

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// TestDistributions: on RKE2 and k3s, a command restarts that service and names its
// kubeconfig, and says nothing of kubeadm.
func TestDistributions(t *testing.T) {
	faults := map[string]func(*Node){
		"kube-apiserver/old":                 func(n *Node) { n.API.Value.Version = "v1.28.9" },
		"kube-apiserver/never-called":        func(n *Node) { n.API.Value.Metrics = is(Metrics{}) },
		"kube-apiserver/other-configuration": func(n *Node) { n.API.Value.Metrics.Value.ConfigHash = "sha256:00" },
		"cluster-store/unreachable":          func(n *Node) { n.outOfStep(seal.CauseUnavailable, "", "the API answers 403") },
		"cluster-store/certificate":          func(n *Node) { n.Certificate.Value.Problem = "it has ended" },
	}
	for kubeconfig, want := range map[string]map[string]string{
		"/etc/kubernetes/admin.conf": {
			"kube-apiserver/old": "kubeadm upgrade", "kube-apiserver/never-called": "kleidi kubeadm patch --apply ", "kube-apiserver/other-configuration": "crictl stop ",
		},
		"/etc/rancher/rke2/rke2.yaml": {
			"kube-apiserver/old": "systemctl restart rke2-server   # after", "kube-apiserver/never-called": "systemctl restart rke2-server   # after deploy/rke2/kleidi.yaml ", "kube-apiserver/other-configuration": "systemctl restart rke2-server",
		},
		"/etc/rancher/k3s/k3s.yaml": {
			"kube-apiserver/old": "systemctl restart k3s   # after", "kube-apiserver/never-called": "systemctl restart k3s   # after deploy/k3s/kleidi.yaml ", "kube-apiserver/other-configuration": "systemctl restart k3s",
		},
	} {
		for id, plant := range faults {
			n := healthy(t)
			n.write(t, kubeconfig, "")
			plant(n)
			wanted := want[id]
			if wanted == "" {
				wanted = "kleidi cluster setup --kubeconfig " + kubeconfig
			}
			if f := n.Examine().Findings; len(f) != 1 || f[0].ID != id || !strings.HasPrefix(f[0].Command, wanted) {
				t.Errorf("%s: %+v, want %s and %q", kubeconfig, f, id, wanted)
			} else if out, err := exec.Command("sh", "-n", "-c", f[0].Command).CombinedOutput(); err != nil {
				t.Errorf("%q: %s", f[0].Command, out)
			}
		}
	}
}
