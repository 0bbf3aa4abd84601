package cluster

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/nspawn"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// TestStaticPod follows docs/static-pod.md: kubelet runs kleidi and kube-apiserver as
// neighbours, and either may be the first to start.
func TestStaticPod(t *testing.T) {
	t.Parallel()
	n := NewKubeNode(t, KubeNodeSetup{Name: "cp-1", Address: "10.99.0.1"})
	image := Image{Reference: "localhost/kleidi:node", Binary: node.Binary(t), Path: "/kleidi", Entrypoint: []string{"/kleidi"}}
	f, err := os.Create(n.Path("root/kleidi-image.tar"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(image.Write(f), f.Close()); err != nil {
		t.Fatal(err)
	}
	n.Copy(node.Binary(t), "usr/local/bin/kleidi")
	n.Sh("mkdir -p /root/deploy/tmpfiles.d /etc/kleidi")
	n.Copy("../../deploy/tmpfiles.d/kleidi.conf", "root/deploy/tmpfiles.d/kleidi.conf")
	n.Write("root/deploy/static-pod/kleidi.yaml", withSimulatedTPM(t))
	n.Configure("")
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	steps := shellBlocks(t, "../../docs/static-pod.md")
	// [0] builds the image
	n.Sh(strings.ReplaceAll(steps[1], "age1…", identity.Recipient().String()))
	n.Sh(steps[2])
	n.Sh("kleidi kubeadm patch --dir /etc/kubernetes/patches")
	n.Write("root/kubeadm.yaml", n.Config("patches: {directory: /etc/kubernetes/patches}", ""))
	n.ShFor(15*time.Minute, "kubeadm init --config /root/kubeadm.yaml")
	n.create("lab")
	if out := n.Sh("kleidi status"); !strings.Contains(out, "open since") {
		t.Errorf("kleidi status on the host: %s", out)
	}
	allEncrypted(t, n)
	// kubelet announces its static pods, and takes two minutes to end a pod that was
	// removed before that.
	node.Eventually(t, 10*time.Minute, "kubelet announces kleidi", func() error {
		out, err := n.TryKubectl("-n kube-system wait --for=condition=Ready --timeout=60s pod/kleidi-cp-1")
		if err != nil {
			return errors.New(out)
		}
		return nil
	})

	// kube-apiserver first: it starts, says what it lacks, and answers once kleidi serves.
	n.StopPod("kleidi")
	n.StopPod("kube-apiserver")
	n.StartPod("kube-apiserver")
	node.Eventually(t, 10*time.Minute, "kube-apiserver misses kleidi", func() error {
		out, err := n.TryKubectl("get --raw /readyz?verbose")
		if err == nil || !strings.Contains(out, "[-]kms-provider") {
			return errors.New(out)
		}
		return nil
	})
	n.StartPod("kleidi")
	readable(t, n)

	// kleidi first
	n.StopPod("kube-apiserver")
	n.StopPod("kleidi")
	n.StartPod("kleidi")
	node.Eventually(t, 10*time.Minute, "kleidi is open", func() error {
		out, err := n.Try("kleidi status --quick")
		if err != nil {
			return errors.New(out)
		}
		return nil
	})
	n.StartPod("kube-apiserver")
	readable(t, n)

	// both at once
	n.PowerOff()
	n.TPM.Reboot(simboot.Baseline(simboot.UKI))
	n.Boot()
	readable(t, n)

	if out := n.Sh("journalctl -u kubelet -o cat | grep 'Static pod has' || true"); out != "" {
		t.Errorf("kubelet finds fault with a static pod: %s", out)
	}
	if events := n.Kubectl("get events -A"); strings.Contains(events, "Pulling") || strings.Contains(events, "ErrImage") {
		t.Errorf("an image was pulled:\n%s", events)
	}
}

// withSimulatedTPM returns deploy/static-pod's manifest for a swtpm, changed as its own
// comment says: less rights, and the simulator's folder in the TPM's place.
func withSimulatedTPM(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../deploy/static-pod/kleidi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	s := string(b)
	_, rights, found := strings.Cut(s, "With a tpm.device of unix:… write\n")
	if !found {
		t.Fatal("the manifest does not say what a tpm.device of unix:… needs")
	}
	rights, _, _ = strings.Cut(rights, "        privileged: true\n")
	s = strings.Replace(s, "        privileged: true\n", strings.ReplaceAll(rights, "#   ", ""), 1)
	s = strings.Replace(s, "mountPath: /dev/tpmrm0", "mountPath: "+nspawn.Simulated, 1)
	return strings.Replace(s, "{path: /dev/tpmrm0, type: CharDevice}", "{path: "+nspawn.Simulated+", type: Directory}", 1)
}

// shellBlocks returns a document's blocks of commands.
func shellBlocks(t *testing.T, file string) (blocks []string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range strings.Split(string(b), "```sh\n")[1:] {
		block, _, _ := strings.Cut(part, "```")
		var unindented strings.Builder
		for line := range strings.Lines(block) {
			unindented.WriteString(strings.TrimPrefix(line, "   "))
		}
		blocks = append(blocks, unindented.String())
	}
	return blocks
}
