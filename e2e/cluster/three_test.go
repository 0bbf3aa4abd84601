package cluster

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/nspawn"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// TestMain gives the tests a network of their own, for the bridge of the machines.
func TestMain(m *testing.M) {
	code, isolated := Isolated(func() error {
		if _, err := Built(kubernetes...); err != nil {
			return err
		}
		return nspawn.Fetch()
	})
	if !isolated {
		code = m.Run()
	}
	os.Exit(code)
}

// endpoint is the cluster's name for all its kube-apiservers: /etc/hosts lists all
// addresses, and a client takes the first that answers.
const endpoint = "api.cluster.test"

func address(i int) string { return fmt.Sprintf("10.99.0.%d", i+1) }

// bridged makes the bridge, once.
var bridged = sync.OnceValue(func() error {
	_, err := NewNetwork(0)
	return err
})

// newControlPlane boots machines on one bridge.
func newControlPlane(t *testing.T, count int) (nodes []*KubeNode) {
	t.Helper()
	if err := bridged(); err != nil {
		t.Fatal(err)
	}
	hosts := "127.0.0.1 localhost\n"
	for i := range count {
		hosts += fmt.Sprintf("%s cp-%d %s\n", address(i), i+1, endpoint)
	}
	deb := filepath.Join(nspawn.Package(t, "v1.0.0"), "kleidi_1.0.0_amd64.deb")
	for i := range count {
		n := NewKubeNode(t, KubeNodeSetup{Name: fmt.Sprintf("cp-%d", i+1), Address: address(i), Network: "ip link set host0 name node0", Args: []string{"--network-bridge=br0", "--resolv-conf=off"}})
		n.Write("etc/hosts", hosts)
		n.Copy(deb, "root/kleidi.deb")
		n.Sh("dpkg -i kleidi.deb")
		nodes = append(nodes, n)
	}
	return nodes
}

// own is a command of kubectl for the node's own kube-apiserver.
func (n *KubeNode) own(command string) string {
	return "kubectl --kubeconfig /etc/kubernetes/admin.conf --server https://" + n.s.Address + ":6443 " + command
}

const password = "correct-horse"

// create makes a Secret with the password.
func (n *KubeNode) create(secret string) {
	n.t.Helper()
	node.Eventually(n.t, 5*time.Minute, n.s.Name+" writes "+secret, func() error {
		said, err := n.Try(n.own("create secret generic " + secret + " --from-literal=password=" + password))
		if err != nil && !strings.Contains(said, "already exists") {
			return fmt.Errorf("%w: %s", err, said)
		}
		return nil
	})
}

// withKubeadm returns the commands of docs/high-availability.md that kubeadm needs, for the
// seat and for a new machine.
func withKubeadm(t *testing.T) (onSeat, onNew string) {
	t.Helper()
	b, err := os.ReadFile("../../docs/high-availability.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(b), "### With kubeadm\n")
	section, _, _ = strings.Cut(section, "\n## ")
	_, onSeat, _ = strings.Cut(section, "```sh\n")
	onSeat, section, _ = strings.Cut(onSeat, "```")
	_, onNew, _ = strings.Cut(section, "```sh\n")
	onNew, _, found := strings.Cut(onNew, "```")
	if !found {
		t.Fatal("docs/high-availability.md has no two blocks about kubeadm")
	}
	return onSeat, onNew
}

// joinSettings are what kubeadm join needs on a test's node, in addition to what the documents
// write.
const joinSettings = "nodeRegistration: {imagePullPolicy: Never, ignorePreflightErrors: [SystemVerification]}\n" + patient

// makeSeat makes the keyring and starts kleidi, which then lets other machines join.
func makeSeat(t *testing.T, n *KubeNode, flags string) {
	t.Helper()
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	n.Configure("join: {listen: " + n.s.Address + ":9780}\n")
	// what `systemctl edit kleidi` writes
	n.Write("etc/systemd/system/kleidi.service.d/override.conf", "[Service]\nIPAddressAllow=10.99.0.0/24\n")
	n.Sh("systemctl daemon-reload; kleidi init --recovery-recipient " + identity.Recipient().String() + " " + flags + "; systemctl enable --now kleidi")
}

// TestThreeNodes follows docs/high-availability.md with kubeadm: the second and the third
// machine join through kleidi, which hands kubeadm's secrets over. Then the KEK is rotated,
// and the machines reboot.
func TestThreeNodes(t *testing.T) {
	lap := stopwatch(t)
	nodes := newControlPlane(t, 3)
	seat := nodes[0]
	lap("three machines")

	makeSeat(t, seat, "--encryption-config /etc/kubernetes/kleidi-encryption.yaml")
	seat.Sh("kleidi kubeadm patch --dir /etc/kubernetes/patches")
	seat.Write("root/kubeadm.yaml", seat.Config("patches: {directory: /etc/kubernetes/patches}", "controlPlaneEndpoint: "+endpoint+":6443"))
	seat.ShFor(15*time.Minute, "kubeadm init --config kubeadm.yaml")
	lap("kubeadm init")
	seat.create("lab")

	onSeat, onNew := withKubeadm(t)
	seat.ShFor(5*time.Minute, onSeat)
	seat.Write("root/join.yaml", seat.Read("root/join.yaml")+joinSettings)
	for _, n := range nodes[1:] {
		admit(seat, n, "--bootstrap-file join.yaml")
		lap(n.s.Name + " has the KEK")
		n.ShFor(15*time.Minute, onNew)
		lap(n.s.Name + " joined")
	}
	readEverywhere(t, nodes, "lab")
	lap("a Secret is read through each")

	setUpStore(t, nodes)
	rotate(t, nodes)
	lap("rotation")
	for _, n := range nodes {
		n.PowerOff()
		for _, other := range nodes {
			if other != n {
				other.reads("rotated")
			}
		}
		n.restart()
		readEverywhere(t, []*KubeNode{n}, "lab", "rotated")
		lap("reboot of " + n.s.Name)
	}
	for _, n := range nodes {
		n.PowerOff()
	}
	for _, n := range nodes {
		n.restart()
	}
	readEverywhere(t, nodes, "lab", "rotated")
	lap("reboot of all")
}

// admit approves a machine on the seat, and has it join.
func admit(seat, n *KubeNode, flags string) {
	n.t.Helper()
	n.Configure("")
	var shown struct{ EK string }
	if err := json.Unmarshal([]byte(n.Sh("kleidi node identity -o json 2>/dev/null")), &shown); err != nil {
		n.t.Fatal(err)
	}
	seat.Sh("[ -e policy.yaml ] || kleidi bootpolicy record --file policy.yaml")
	said := seat.Sh("kleidi node approve " + n.s.Name + " --ek " + shown.EK + " --boot-policy policy.yaml " + flags)
	_, command, found := strings.Cut(said, "kleidi join ")
	if !found {
		n.t.Fatalf("node approve prints no command:\n%s", said)
	}
	command, _, _ = strings.Cut(command, "\n")
	node.Again(n.t, 5*time.Minute, n.s.Name+" joins", func() error {
		said, err := n.Try("kleidi join " + command)
		if err != nil {
			return fmt.Errorf("%w: %s", err, said)
		}
		return nil
	}, node.JoinAgain...)
}

// restart boots a machine that is off.
func (n *KubeNode) restart() {
	n.t.Helper()
	n.TPM.Reboot(simboot.Baseline(simboot.UKI))
	n.Boot()
}

// reads waits until the node's kube-apiserver reads a Secret that create has made.
func (n *KubeNode) reads(secret string) {
	n.t.Helper()
	node.Eventually(n.t, 10*time.Minute, n.s.Name+" reads "+secret, func() error {
		said, err := n.Try(n.own("get secret " + secret + " -o jsonpath='{.data.password}'"))
		if err == nil && said != base64.StdEncoding.EncodeToString([]byte(password)) {
			n.t.Fatalf("%s reads %q", n.s.Name, said)
		}
		if err != nil {
			return fmt.Errorf("%w: %s", err, said)
		}
		return nil
	})
}

// readEverywhere reads Secrets through each node, and all raw values in each etcd.
func readEverywhere(t *testing.T, nodes []*KubeNode, secrets ...string) {
	t.Helper()
	for _, n := range nodes {
		for _, s := range secrets {
			n.reads(s)
		}
		stored := n.Stored("/registry/secrets/")
		for _, s := range secrets {
			if _, ok := stored["/registry/secrets/default/"+s]; !ok {
				t.Errorf("%s's etcd has no %s", n.s.Name, s)
			}
		}
		for key, value := range stored {
			if !bytes.HasPrefix(value, []byte(provider)) || bytes.Contains(value, []byte(password)) {
				t.Errorf("on %s %s begins with %q", n.s.Name, key, value[:min(len(value), 40)])
			}
		}
	}
}

// setUpStore sets the cluster store up, on the seat last, and returns once all nodes are in
// step with it.
func setUpStore(t *testing.T, nodes []*KubeNode) {
	t.Helper()
	for _, n := range append(slices.Clone(nodes[1:]), nodes[0]) {
		var said string
		node.Again(t, 10*time.Minute, "cluster setup on "+n.s.Name, func() (err error) {
			said, err = n.Try("kleidi cluster setup --kubeconfig /etc/kubernetes/admin.conf --server https://" + n.s.Address + ":6443")
			if err != nil {
				return fmt.Errorf("%w: %s", err, said)
			}
			return nil
		}, node.SetUpAgain...)
		_, next, found := strings.Cut(said, "next, as root:\n")
		if !found {
			t.Fatalf("cluster setup prints no commands to go on with: %s", said)
		}
		n.ShFor(5*time.Minute, next)
	}
	for _, n := range nodes {
		node.Eventually(t, 5*time.Minute, n.s.Name+" is in step with the store", func() error {
			if said, err := n.Try("kleidi status -o json"); err != nil || !strings.Contains(said, `"inStep": true`) {
				return fmt.Errorf("%w: %s", err, said)
			}
			return nil
		})
	}
}

// rotate rotates the KEK.
func rotate(t *testing.T, nodes []*KubeNode) {
	t.Helper()
	former := nodes[0].keyID()
	t.Log(nodes[1].ShFor(15*time.Minute, "kleidi rotate --wait --timeout 10m"))
	for _, n := range nodes {
		if now := n.keyID(); now == former || now != nodes[0].keyID() {
			t.Errorf("%s announces %s, formerly %s", n.s.Name, now, former)
		}
	}
	nodes[2].create("rotated")
}

// keyID returns the key ID that the node announces.
func (n *KubeNode) keyID() string {
	n.t.Helper()
	var status struct {
		CurrentKeyID string `json:"currentKeyID"`
	}
	if err := json.Unmarshal([]byte(n.Sh("kleidi status -o json 2>/dev/null")), &status); err != nil || status.CurrentKeyID == "" {
		n.t.Fatalf("kleidi status shows no key ID: %v", err)
	}
	return status.CurrentKeyID
}
