package doctor

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
	"github.com/beezy-dev/kleidi/seal"
)

const manifest = `spec:
  containers:
  - command: [kube-apiserver, --encryption-provider-config=/etc/kubernetes/kleidi-encryption.yaml]
    volumeMounts:
    - {name: kleidi-encryption, mountPath: /etc/kubernetes/kleidi-encryption.yaml}
    - {name: sockets, mountPath: /run/kleidi}
  volumes:
  - {name: kleidi-encryption, hostPath: {path: /etc/kubernetes/kleidi-encryption.yaml, type: File}}
  - {name: sockets, hostPath: {path: /run/kleidi, type: Directory}}
`

// healthy is a node without a fault.
func healthy(t *testing.T) *Node {
	t.Helper()
	c := config.Default()
	opens := true
	n := &Node{
		Config: c, Serving: true, Version: "v1", Root: t.TempDir(), EncryptionConfig: "/etc/kubernetes/kleidi-encryption.yaml", Manifest: "/etc/kubernetes/manifests/kube-apiserver.yaml",
		Status: admin.StatusReport{Version: "v1", State: admin.Open, Memory: "memfd_secret", Slots: []admin.SlotReport{{Name: "tpm", Type: seal.TypeTPM, Opens: &opens}, {Name: "recovery", Type: seal.TypeRecovery}}},
	}
	encryption := strings.Replace(encryptionconfig.New(c.KMS.Name, c.KMS.Socket, []string{"secrets"}).YAML(), "      - identity: {}\n", "", 1)
	for file, content := range map[string]string{
		"/dev/tpmrm0": "", c.TPM.EventLog: "", c.KMS.Socket: "", c.State.Dir + "/keyring.json": "", "/usr/sbin/kleidi-next-boot": "",
		"/proc/swaps": "Filename Type Size\n/dev/sda2 partition 1\n", n.EncryptionConfig: encryption, n.Manifest: manifest,
	} {
		n.write(t, file, content)
	}
	return n
}

func (n *Node) write(t *testing.T, file, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(n.path(file)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.path(file), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (n *Node) edit(t *testing.T, file, old, replacement string) {
	t.Helper()
	b, err := os.ReadFile(n.path(file))
	if err != nil || !strings.Contains(string(b), old) {
		t.Fatalf("%s has no %q: %v", file, old, err)
	}
	n.write(t, file, strings.Replace(string(b), old, replacement, 1))
}

func (n *Node) remove(t *testing.T, file string) {
	t.Helper()
	if err := os.RemoveAll(n.path(file)); err != nil {
		t.Fatal(err)
	}
}

// faults are planted one at a time: the check of that name finds it, with these words.
var faults = []struct {
	check, want string
	plant       func(*testing.T, *Node)
}{
	{"tpm", "/dev/tpmrm0", func(t *testing.T, n *Node) { n.remove(t, "/dev/tpmrm0") }},
	{"tpm-users", "group tss", func(_ *testing.T, n *Node) { n.Status.TPMOpenTo = "group tss" }},
	{"event-log", "securityfs", func(t *testing.T, n *Node) { n.remove(t, n.Config.TPM.EventLog) }},
	{"folders", "/var/lib/kleidi", func(t *testing.T, n *Node) { n.remove(t, n.Config.State.Dir) }},
	{"serve", "enable --now", func(_ *testing.T, n *Node) { n.Serving = false }},
	{"serve", "kms.sock is not there", func(t *testing.T, n *Node) { n.remove(t, n.Config.KMS.Socket) }},
	{"version", "restart", func(_ *testing.T, n *Node) { n.Version = "v2" }},
	{"keyring", "PCR 11 differs", func(_ *testing.T, n *Node) {
		n.Status.State, n.Status.Problem = admin.Locked, &admin.Problem{Message: "another boot", Details: []string{"PCR 11 differs"}, Hint: "kleidi recover"}
	}},
	{"keyring", "may not open", func(_ *testing.T, n *Node) { n.Status.Fallback = &admin.Problem{Message: "the TPM did not open it"} }},
	{"keyring", "kleidi init", func(_ *testing.T, n *Node) {
		n.Status.State, n.Status.Problem = admin.Locked, &admin.Problem{Cause: seal.CauseKeyringMissing, Message: "there is no keyring", Hint: "run kleidi init"}
	}},
	{"keyslots", "keyslot tpm", func(_ *testing.T, n *Node) { n.Status.Slots[0].Problem = &admin.Problem{Message: "epoch passed"} }},
	{"recovery", "--recipient", func(_ *testing.T, n *Node) { n.Status.Slots = n.Status.Slots[:1] }},
	{"suspension", "kleidi reseal", func(_ *testing.T, n *Node) { n.Status.Suspension = &admin.Suspension{Binding: "PCR 7"} }},
	{"debts", "kept copies", func(_ *testing.T, n *Node) {
		n.Status.Unrevoked = []admin.Unrevoked{{Message: "kept copies", Hint: "kleidi reseal"}}
	}},
	{"changed-outside", "slot remove", func(_ *testing.T, n *Node) { n.Status.ChangedOutside = []admin.OutsideChange{{Change: "added"}} }},
	{"memory", "LimitMEMLOCK", func(_ *testing.T, n *Node) { n.Status.Memory = "unlocked" }},
	{"memory", "swapoff", func(_ *testing.T, n *Node) { n.Config.Memory.Lock = config.LockBestEffort }},
	{"encryption-configuration", "there is no", func(t *testing.T, n *Node) { n.remove(t, n.EncryptionConfig) }},
	{"encryption-configuration", "kind", func(t *testing.T, n *Node) { n.write(t, n.EncryptionConfig, "kind: Pod") }},
	{"encryption-configuration", "is first for no resource", func(t *testing.T, n *Node) {
		n.edit(t, n.EncryptionConfig, "providers:\n", "providers:\n      - aescbc: {}\n")
	}},
	{"encryption-configuration", "names the socket", func(t *testing.T, n *Node) { n.edit(t, n.EncryptionConfig, "/run/kleidi/kms.sock", "/run/other.sock") }},
	{"encryption-configuration", "encrypts the cluster store", func(t *testing.T, n *Node) { n.edit(t, n.EncryptionConfig, "- secrets", "- '*.*'") }},
	{"encryption-configuration", "identity", func(t *testing.T, n *Node) {
		n.edit(t, n.EncryptionConfig, "providers:\n      - kms:\n", "providers:\n      - kms:\n          cachesize: 1\n")
		b, _ := os.ReadFile(n.path(n.EncryptionConfig))
		n.write(t, n.EncryptionConfig, string(b)+"      - identity: {}\n")
	}},
	{"kube-apiserver", "kubeadm patch --apply", func(t *testing.T, n *Node) { n.edit(t, n.Manifest, "--encryption-provider-config=", "--other=") }},
	{"kube-apiserver", "mount it and the folder", func(t *testing.T, n *Node) {
		n.edit(t, n.Manifest, "path: /run/kleidi,", "path: /run/kleidi/kms.sock,")
	}},
	{"kube-apiserver", "already has", func(t *testing.T, n *Node) { n.edit(t, n.Manifest, "config=/etc", "config=/other") }},
	{"hooks", "updates", func(t *testing.T, n *Node) { n.remove(t, "/usr/sbin/kleidi-next-boot") }},
}

// TestFaults: each check finds its fault, and no other check reports it.
func TestFaults(t *testing.T) {
	for _, f := range faults {
		t.Run(f.check+"/"+f.want, func(t *testing.T) {
			n := healthy(t)
			f.plant(t, n)
			r := n.Examine()
			if len(r.Findings) != 1 {
				t.Fatalf("findings %+v", r.Findings)
			}
			got := r.Findings[0]
			if got.Check != f.check || !strings.Contains(got.What+"|"+got.Why+"|"+got.Command, f.want) || got.Command == "" || got.Why == "" {
				t.Errorf("%+v", got)
			}
			if r.Healthy() != got.Note {
				t.Errorf("healthy: %v with %+v", r.Healthy(), got)
			}
		})
	}
}

// TestHealthy: nothing is found on a node without a fault, and each check has a fault above.
func TestHealthy(t *testing.T) {
	r := healthy(t).Examine()
	if len(r.Findings) > 0 || !r.Healthy() {
		t.Errorf("%+v", r.Findings)
	}
	for _, name := range r.Checks {
		if !slices.ContainsFunc(faults, func(f struct {
			check, want string
			plant       func(*testing.T, *Node)
		}) bool {
			return f.check == name
		}) {
			t.Errorf("no fault is planted for %s", name)
		}
	}
}
