package cluster

import (
	"strings"
	"testing"
	"time"
)

// TestExistingControlPlane brings kleidi into a cluster of two control-plane nodes that stores
// its Secrets in clear, as docs/high-availability.md says. After each step each node reads
// what the other one writes.
func TestExistingControlPlane(t *testing.T) {
	lap := stopwatch(t)
	nodes := newControlPlane(t, 2)
	seat, other := nodes[0], nodes[1]
	seat.Write("root/kubeadm.yaml", seat.Config("", "controlPlaneEndpoint: "+endpoint+":6443"))
	seat.ShFor(15*time.Minute, "kubeadm init --config kubeadm.yaml")
	onSeat, _ := withKubeadm(t)
	onSeat, found := strings.CutSuffix(onSeat, "patches:\n  directory: /etc/kubernetes/patches\nEOF\n")
	if !found {
		t.Fatalf("docs/high-availability.md has another end of join.yaml:\n%s", onSeat)
	}
	seat.ShFor(5*time.Minute, onSeat+"EOF\n")
	other.Write("root/join.yaml", seat.Read("root/join.yaml")+joinSettings)
	other.ShFor(15*time.Minute, "kubeadm join --config join.yaml")
	lap("a cluster without kleidi")
	written := writeOnEach(nodes, "before")

	makeSeat(t, seat, "")
	admit(seat, other, "")
	other.Sh("systemctl enable --now kleidi")
	for _, n := range nodes {
		if said := n.Sh("kleidi status"); !strings.Contains(said, "open since") {
			t.Fatalf("%s: %s", n.s.Name, said)
		}
	}
	lap("both have the KEK")

	const file = "/etc/kubernetes/kleidi-encryption.yaml"
	for _, n := range nodes {
		n.Sh("kleidi encryption-config --step=1 --resources=secrets --file=" + file)
		n.ShFor(15*time.Minute, "kleidi kubeadm patch --apply")
		written = append(written, writeOnEach(nodes, "step-1-on-"+n.s.Name)...)
	}
	lap("step 1")
	for _, step := range []string{"2", "3"} {
		for _, n := range nodes {
			n.Sh("kleidi encryption-config --from=" + file + " --step=" + step)
			n.StopPod("kube-apiserver")
			n.StartPod("kube-apiserver")
			written = append(written, writeOnEach(nodes, "step-"+step+"-on-"+n.s.Name)...)
		}
		if step == "2" {
			seat.Sh("kleidi migrate --by=patch --encryption-config=" + file)
			for _, n := range nodes {
				n.Sh("kleidi usage --encryption-config=" + file)
			}
		}
		lap("step " + step)
	}
	readEverywhere(t, nodes, written...)
	setUpStore(t, nodes)
	lap("cluster store")
}

// writeOnEach has each node write a Secret, and each read all of them. It returns their names.
func writeOnEach(nodes []*KubeNode, name string) (secrets []string) {
	for _, n := range nodes {
		n.create(name + "." + n.s.Name)
		secrets = append(secrets, name+"."+n.s.Name)
	}
	for _, n := range nodes {
		for _, s := range secrets {
			n.reads(s)
		}
	}
	return secrets
}
