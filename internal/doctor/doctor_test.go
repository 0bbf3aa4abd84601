package doctor

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/doctor/credential"
	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
	"github.com/beezy-dev/kleidi/seal"
)

const goodManifest = `spec:
  containers:
  - command: [kube-apiserver, --encryption-provider-config=/etc/kubernetes/kleidi-encryption.yaml]
    volumeMounts:
    - {name: kleidi-encryption, mountPath: /etc/kubernetes/kleidi-encryption.yaml}
    - {name: sockets, mountPath: /run/kleidi}
  volumes:
  - {name: kleidi-encryption, hostPath: {path: /etc/kubernetes/kleidi-encryption.yaml, type: File}}
  - {name: sockets, hostPath: {path: /run/kleidi, type: Directory}}
`

var now = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

func is[T any](v T) Known[T] { return Known[T]{Value: &v} }

// healthy returns a node without a fault.
func healthy(t *testing.T) *Node {
	t.Helper()
	c := config.Default()
	c.Cluster.Kubeconfig = "/etc/kleidi/cluster.kubeconfig"
	opens := true
	n := &Node{
		Config: c, ConfigFile: "/etc/kleidi/config.yaml", Serving: true, Version: "v1", Package: "kleidi_VERSION_amd64.deb", Root: t.TempDir(), Now: now,
		EncryptionConfig: "/etc/kubernetes/kleidi-encryption.yaml", Manifest: "/etc/kubernetes/manifests/kube-apiserver.yaml",
		Status: admin.StatusReport{Version: "v1", State: admin.Open, Memory: "memfd_secret", Cluster: &admin.ClusterReport{InStep: true},
			Keys:  []admin.KeyReport{{KeyID: "k1-a", Role: "current", Created: now.Add(-time.Hour)}},
			Slots: []admin.SlotReport{{Name: "tpm", Type: seal.TypeTPM, Opens: &opens}, {Name: "recovery", Type: seal.TypeRecovery}}},
		TPM: is(TPM{OwnerAuthSet: true, Most: 32}), Boot: is(Boot{Type: "grub", PCRs: []int{4, 7, 8, 9}, Whole: []int{4, 7, 8, 9}, Phase: "ready"}),
		Process: is(Process{PID: 7, Locked: 1 << 20, MaxCore: "0"}), Disk: is(Disk{Free: 1 << 40, Inodes: 1}), Synchronised: is(true),
		API:         is(API{Version: "v1.36.3", Metrics: is(Metrics{Calls: map[string]float64{"OK": 3}, Status: now})}),
		Nodes:       is(admin.NodeList{Nodes: []admin.NodeReport{{Node: "cp-1", Self: true}, {Node: "cp-2", Record: &admin.NodeRecord{Version: "v1", Started: now}}}}),
		Certificate: is(Certificate{File: "/etc/kleidi/cluster.crt", Ends: now.Add(300 * 24 * time.Hour), Lives: 365 * 24 * time.Hour}),
	}
	encryption := strings.Replace(encryptionconfig.New(c.KMS.Name, c.KMS.Socket, []string{"secrets"}).YAML(), "      - identity: {}\n", "", 1)
	for file, content := range map[string]string{
		"/dev/tpmrm0": "", c.TPM.EventLog: "", c.KMS.Socket: "", c.State.Dir + "/keyring.json": "", "/usr/sbin/kleidi-next-boot": "#!/bin/sh\n",
		"/proc/swaps": "Filename Type Size\n/dev/sda2 partition 1\n", "/proc/cmdline": "BOOT_IMAGE=/vmlinuz roothash=ab\n", "/proc/stat": "cpu 1\nbtime 1793000000\n",
		"/boot/grub/grub.cfg": "", "/etc/debian_version": "13\n", "/etc/dpkg/dpkg.cfg.d/kleidi": "post-invoke=/usr/sbin/kleidi-next-boot after-dpkg\n",
		"/etc/kernel/postinst.d/zzz-kleidi": "", "/usr/lib/systemd/system/kleidi.service": "[Service]\n",
		"/etc/systemd/system/multi-user.target.wants/kleidi.service": "", n.ConfigFile: "", n.EncryptionConfig: encryption, n.Manifest: goodManifest,
	} {
		n.write(t, file, content)
	}
	n.chmod(t, c.State.Dir, 0o700)
	for _, f := range []string{"/usr/sbin/kleidi-next-boot", "/etc/kernel/postinst.d/zzz-kleidi"} {
		n.chmod(t, f, 0o755)
	}
	n.touch(t, "/boot/grub/grub.cfg", time.Unix(1792990000, 0))
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

func (n *Node) chmod(t *testing.T, file string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(n.path(file), mode); err != nil {
		t.Fatal(err)
	}
}

// retire gives the keyring this many retired KEKs.
func (n *Node) retire(count int) {
	for range count - 1 {
		n.Status.Keys = append(n.Status.Keys, admin.KeyReport{KeyID: "k1-retired", Role: "retired"})
	}
	n.Status.Keys = append(n.Status.Keys, admin.KeyReport{KeyID: "k1-oldest", Role: "retired"})
}

func (n *Node) touch(t *testing.T, file string, at time.Time) {
	t.Helper()
	if err := os.Chtimes(n.path(file), at, at); err != nil {
		t.Fatal(err)
	}
}

func (n *Node) kms(key, value string) func(*testing.T) {
	return func(t *testing.T) {
		b, _ := os.ReadFile(n.path(n.EncryptionConfig))
		n.write(t, n.EncryptionConfig, regexp.MustCompile(`(?m)\b`+key+`: \S+$`).ReplaceAllString(string(b), key+": "+value))
	}
}

// second adds an entry for ConfigMaps.
func (n *Node) second(t *testing.T, providers ...string) {
	b, _ := os.ReadFile(n.path(n.EncryptionConfig))
	n.write(t, n.EncryptionConfig, string(b)+"  - resources: [configmaps]\n    providers:\n      - "+strings.Join(providers, "\n      - ")+"\n")
}

// fault is planted alone: doctor finds id, with these words, and nothing else.
type fault struct {
	id, want string
	plant    func(*testing.T, *Node)
}

var faults = []fault{
	{"configuration/refused", "kms.soket", func(_ *testing.T, n *Node) { n.NoConfig = "kms.soket: unknown key" }},
	{"tpm/missing", "/dev/tpmrm0", func(t *testing.T, n *Node) { n.remove(t, "/dev/tpmrm0") }},
	{"tpm/version-1.2", "TPM 1.2", func(t *testing.T, n *Node) { n.write(t, versionFile, "1\n") }},
	{"tpm/silent", "does not answer: timeout", func(_ *testing.T, n *Node) { n.TPM = Known[TPM]{Why: "timeout"} }},
	{"tpm/lockout", "32 wrong", func(_ *testing.T, n *Node) { n.TPM.Value.InLockout, n.TPM.Value.Failed = true, 32 }},
	{"tpm/wrong-authorizations", "locks itself out at 32", func(_ *testing.T, n *Node) { n.TPM.Value.Failed = 3 }},
	{"tpm-users/others", "group tss", func(_ *testing.T, n *Node) { n.Status.TPMOpenTo = "eve, by group tss" }},
	{"owner-authorization/empty", "changeauth", func(_ *testing.T, n *Node) { n.TPM.Value.OwnerAuthSet = false }},
	{"event-log/missing", "securityfs", func(t *testing.T, n *Node) { n.remove(t, n.Config.TPM.EventLog) }},
	{"event-log/unreadable", "is cut short", func(_ *testing.T, n *Node) { n.Boot = is(Boot{LogProblem: "the log is cut short"}) }},
	{"event-log/differs", "PCR 9", func(_ *testing.T, n *Node) { n.Boot.Value.Mismatch = "PCR 9" }},
	{"pcrs/open", "command line (PCR 8 is left out)", func(_ *testing.T, n *Node) {
		n.Boot.Value.PCRs, n.Boot.Value.Open = []int{4, 7}, []string{"command line (PCR 8 is left out)"}
	}},
	{"pcrs/unmeasured", "PCR 8, 9", func(_ *testing.T, n *Node) { n.Boot.Value.AtReset = []int{8, 9} }},
	{"phase/other", `"sysinit"`, func(_ *testing.T, n *Node) { n.Boot.Value.Phase = "sysinit" }},
	{"phase/restarted", "reboot", func(_ *testing.T, n *Node) { n.Boot.Value.Restart = "kexec" }},
	{"folders/missing", "/var/lib/kleidi", func(t *testing.T, n *Node) { n.remove(t, n.Config.State.Dir) }},
	{"files/readable", "keyring.json has mode 0644", func(t *testing.T, n *Node) { n.chmod(t, n.Config.Keyring(), 0o644) }},
	{"files/readable", "chmod 0600 /etc/kleidi/pin", func(t *testing.T, n *Node) {
		n.Config.PKCS11.PINFile = "/etc/kleidi/pin"
		n.write(t, "/etc/kleidi/pin", "")
		n.chmod(t, "/etc/kleidi/pin", 0o640)
	}},
	{"files/writable", "policy.yaml has mode 0620", func(t *testing.T, n *Node) {
		n.Config.TPM.BootPolicy = "/etc/kleidi/policy.yaml"
		n.write(t, n.Config.TPM.BootPolicy, "")
		n.chmod(t, n.Config.TPM.BootPolicy, 0o620)
	}},
	{"files/missing", "vault.auth.tokenFile", func(_ *testing.T, n *Node) { n.Config.Vault.Auth.TokenFile = "/etc/kleidi/token" }},
	{"disk/full", "3 MB", func(_ *testing.T, n *Node) { n.Disk.Value.Free = 3 << 20 }},
	{"disk/full", "inodes", func(_ *testing.T, n *Node) { n.Disk.Value.Inodes = 0 }},
	{"unit/weakened", "NoNewPrivileges = no", func(t *testing.T, n *Node) {
		n.write(t, "/etc/systemd/system/kleidi.service.d/local.conf", "[Service]\n NoNewPrivileges = no\n")
	}},
	{"unit/overridden", "replaces", func(t *testing.T, n *Node) { n.write(t, "/etc/systemd/system/kleidi.service", "[Service]\n") }},
	{"unit/not-enabled", "enable kleidi", func(t *testing.T, n *Node) {
		n.remove(t, "/etc/systemd/system/multi-user.target.wants/kleidi.service")
	}},
	{"serve/stopped", "enable --now", func(_ *testing.T, n *Node) { n.Serving = false }},
	{"serve/no-socket", "kms.sock is not there", func(t *testing.T, n *Node) { n.remove(t, n.Config.KMS.Socket) }},
	{"version/restart", "restart", func(_ *testing.T, n *Node) { n.Version = "v2" }},
	{"keyring/locked", "PCR 11 differs", func(_ *testing.T, n *Node) {
		n.Status.State, n.Status.Problem = admin.Locked, &admin.Problem{Message: "another boot", Details: []string{"PCR 11 differs"}, Hint: "kleidi recover"}
	}},
	{"keyring/locked", "kleidi init", func(_ *testing.T, n *Node) {
		n.Status.State, n.Status.Problem = admin.Locked, &admin.Problem{Cause: seal.CauseKeyringMissing, Message: "there is no keyring", Hint: "run kleidi init"}
	}},
	{"keyring/fallback", "may not open", func(_ *testing.T, n *Node) { n.Status.Fallback = &admin.Problem{Message: "the TPM did not open it"} }},
	{"retired-keks/many", "192 retired KEKs, and 256 fit", func(_ *testing.T, n *Node) { n.retire(192) }},
	{"retired-keks/many", "kleidi prune k1-oldest", func(_ *testing.T, n *Node) { n.retire(255) }},
	{"retired-keks/full", "kleidi prune k1-oldest", func(_ *testing.T, n *Node) { n.retire(256) }},
	{"keyslots/refused", "keyslot tpm", func(_ *testing.T, n *Node) { n.Status.Slots[0].Problem = &admin.Problem{Message: "epoch passed"} }},
	{"keyslots/refused", "last tested", func(_ *testing.T, n *Node) { n.addSlot(&admin.SlotTest{Problem: &admin.Problem{Message: "no answer"}}) }},
	{"keyslots/untested", "slot test vault", func(_ *testing.T, n *Node) { n.addSlot(nil) }},
	{"keyslots/warning", "deletion", func(_ *testing.T, n *Node) {
		n.addSlot(&admin.SlotTest{Opens: true, Warnings: []string{"the key allows its deletion"}})
	}},
	{"recovery/missing", "--recipient", func(_ *testing.T, n *Node) { n.Status.Slots = n.Status.Slots[:1] }},
	{"suspension/running", "kleidi reseal", func(_ *testing.T, n *Node) { n.Status.Suspension = &admin.Suspension{Binding: "PCR 7"} }},
	{"debts/unrevoked", "kept copies", func(_ *testing.T, n *Node) {
		n.Status.Unrevoked = []admin.Unrevoked{{Message: "kept copies", Hint: "kleidi reseal"}}
	}},
	{"changed-outside/slots", "slot remove", func(_ *testing.T, n *Node) { n.Status.ChangedOutside = []admin.OutsideChange{{Change: "added"}} }},
	{"memory/unlocked", "LimitMEMLOCK", func(_ *testing.T, n *Node) { n.Status.Memory = "unlocked" }},
	{"memory/swap", "swapoff", func(_ *testing.T, n *Node) { n.Config.Memory.Lock = config.LockBestEffort }},
	{"memory/process", "process 7", func(_ *testing.T, n *Node) { n.Process.Value.Locked = 0 }},
	{"memory/core", "unlimited", func(_ *testing.T, n *Node) { n.Process.Value.MaxCore = "unlimited" }},
	{"root/unverified", "dm-verity", func(t *testing.T, n *Node) { n.write(t, "/proc/cmdline", "root=/dev/sda1 ro\n") }},
	{"sockets/uid", "UID 65534", func(t *testing.T, n *Node) { n.runAs(t, "65534") }},
	{"sockets/uid", "kms.socketMode 0600", func(t *testing.T, n *Node) {
		n.runAs(t, "1000")
		n.Config.KMS.AllowedUIDs = []uint32{1000}
	}},
	{"sockets/folder", "chmod o+x /run/kleidi", func(t *testing.T, n *Node) {
		n.runAs(t, "1000")
		n.Config.KMS.SocketUID = 1000
		n.chmod(t, "/run/kleidi", 0o750)
	}},
	{"encryption-configuration/missing", "there is no", func(t *testing.T, n *Node) { n.remove(t, n.EncryptionConfig) }},
	{"encryption-configuration/refused", "kind", func(t *testing.T, n *Node) { n.write(t, n.EncryptionConfig, "kind: Pod") }},
	{"encryption-configuration/not-first", "is first for no resource", func(t *testing.T, n *Node) {
		n.edit(t, n.EncryptionConfig, "providers:\n", "providers:\n      - aescbc: {keys: [{name: a, secret: b}]}\n")
	}},
	{"encryption-configuration/not-first", "is first for no resource", func(t *testing.T, n *Node) { n.kms("name", "other")(t) }},
	{"encryption-configuration/endpoint", "names the socket", func(t *testing.T, n *Node) { n.edit(t, n.EncryptionConfig, "/run/kleidi/kms.sock", "/run/other.sock") }},
	{"encryption-configuration/api-version", `"v1"`, func(t *testing.T, n *Node) { n.edit(t, n.EncryptionConfig, "apiVersion: v2", "apiVersion: v1") }},
	{"encryption-configuration/timeout", "timeout 20ms", func(t *testing.T, n *Node) { n.kms("timeout", "20ms")(t) }},
	{"encryption-configuration/timeout", "timeout 5m", func(t *testing.T, n *Node) { n.kms("timeout", "5m")(t) }},
	{"encryption-configuration/store", "encrypts the cluster store", func(t *testing.T, n *Node) { n.edit(t, n.EncryptionConfig, "- secrets", "- '*.*'") }},
	{"encryption-configuration/identity", "identity", func(t *testing.T, n *Node) {
		b, _ := os.ReadFile(n.path(n.EncryptionConfig))
		n.write(t, n.EncryptionConfig, string(b)+"      - identity: {}\n")
	}},
	// kleidi's further entries are judged as its first one is
	{"encryption-configuration/not-first", "kleidi-2 is not the first for configmaps", func(t *testing.T, n *Node) {
		n.second(t, "aescbc: {keys: [{name: a, secret: AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=}]}", "kms: {apiVersion: v2, name: kleidi-2, endpoint: unix:///run/kleidi/kms.sock}")
	}},
	{"encryption-configuration/endpoint", "names the socket unix:///run/other.sock for kleidi-2", func(t *testing.T, n *Node) {
		n.second(t, "kms: {apiVersion: v2, name: kleidi-2, endpoint: unix:///run/other.sock}")
	}},
	{"encryption-configuration/timeout", "kleidi's provider by-another-name has the timeout 5m", func(t *testing.T, n *Node) {
		n.second(t, "kms: {apiVersion: v2, name: by-another-name, endpoint: unix:///run/kleidi/kms.sock, timeout: 5m}")
	}},
	{"encryption-configuration/mode", "0644", func(t *testing.T, n *Node) { n.chmod(t, n.EncryptionConfig, 0o644) }},
	{"manifest/unpatched", "kubeadm patch --apply", func(t *testing.T, n *Node) { n.edit(t, n.Manifest, "--encryption-provider-config=", "--other=") }},
	{"manifest/unpatched", "mount it and the folder", func(t *testing.T, n *Node) {
		n.edit(t, n.Manifest, "path: /run/kleidi,", "path: /run/kleidi/kms.sock,")
	}},
	{"manifest/refused", "already has", func(t *testing.T, n *Node) { n.edit(t, n.Manifest, "config=/etc", "config=/other") }},
	{"kube-apiserver/old", "v1.28.9", func(_ *testing.T, n *Node) { n.API.Value.Version = "v1.28.9" }},
	{"kube-apiserver/never-called", "never", func(_ *testing.T, n *Node) { n.API.Value.Metrics = is(Metrics{}) }},
	{"kube-apiserver/stale", "2026-11-01T11:50:00Z", func(_ *testing.T, n *Node) { n.API.Value.Metrics.Value.Status = now.Add(-10 * time.Minute) }},
	{"kube-apiserver/errors", "2 with Unavailable", func(_ *testing.T, n *Node) { n.API.Value.Metrics.Value.Calls["Unavailable"] = 2 }},
	{"kube-apiserver/key-ids", "refused 1 key", func(_ *testing.T, n *Node) { n.API.Value.Metrics.Value.Invalid = 1 }},
	{"kube-apiserver/other-configuration", "sha256:00", func(_ *testing.T, n *Node) { n.API.Value.Metrics.Value.ConfigHash = "sha256:00" }},
	{"cluster-store/unreachable", "403", func(_ *testing.T, n *Node) {
		n.Status.Cluster.InStep, n.Status.Cluster.Problem = false, &admin.Problem{Message: "the API answers 403"}
	}},
	{"cluster-store/removed", "|systemctl stop kleidi && kleidi reset   # to be", func(_ *testing.T, n *Node) {
		n.outOfStep(seal.CauseNodeRemoved, "stop kleidi serve here (systemctl stop kleidi), then run kleidi reset; to be a node again, have another node approve this one, and join", "revision 7 of the keyring does not hold this node")
		n.Certificate.Value.Ends = now // no command may give it another one
	}},
	{"keyring/locked", "|systemctl stop kleidi && kleidi reset   # to be", func(_ *testing.T, n *Node) {
		n.Status.State, n.Status.Problem = admin.Locked, &admin.Problem{Cause: seal.CauseNodeRemoved, Message: "revision 7 of the keyring does not hold this node", Hint: "stop kleidi serve here"}
		n.Certificate.Value.Ends = now
	}},
	{"cluster-store/forked", "|kleidi keyring show   # here", func(_ *testing.T, n *Node) {
		n.outOfStep(seal.CauseForked, "compare the two on the nodes that hold them, and decide which one to keep", "two keyrings of revision 7 differ")
	}},
	{"cluster-store/refused", "|kleidi node list   # on a node that is in step: does it still list this one? find out who else writes to the cluster store; see ", func(_ *testing.T, n *Node) {
		n.outOfStep(seal.CauseAnchor, "find out who else writes to the cluster store", "the keyring of revision 7 has a current key ID which this node has never acknowledged")
	}},
	{"cluster-store/refused", `this one? see "A fork, or`, func(_ *testing.T, n *Node) {
		n.outOfStep(seal.CauseKeyringCorrupt, "run kleidi keyring restore --previous", "parse keyring: unexpected EOF")
	}},
	{"cluster-store/record", "no such object", func(_ *testing.T, n *Node) {
		n.Status.Cluster.InStep, n.Status.Cluster.Problem = true, &admin.Problem{Message: "record: there is no such object"}
	}},
	{"cluster-store/certificate", "kubectl get csr", func(_ *testing.T, n *Node) { n.Certificate.Value.Ends = now.Add(72 * time.Hour) }},
	{"nodes/behind", "cp-2 is behind", func(_ *testing.T, n *Node) {
		n.Status.Cluster.Behind = []admin.WaitingNode{{Node: "cp-2", Why: "no record"}}
	}},
	{"nodes/unfinished", "kleidi node approve cp-2 --ek sha256:ab", func(_ *testing.T, n *Node) {
		n.Nodes.Value.Nodes[1].EK, n.Nodes.Value.Nodes[1].Unfinished = "sha256:ab", true
	}},
	{"nodes/problem", "locked", func(_ *testing.T, n *Node) { n.Nodes.Value.Nodes[1].Record.Problem = "locked" }},
	{"nodes/version", "version v0", func(_ *testing.T, n *Node) { n.Nodes.Value.Nodes[1].Record.Version = "v0" }},
	{"approvals/open", "cp-3 is approved until 2026-11-01T13:00:00Z", func(_ *testing.T, n *Node) {
		n.Nodes.Value.Approvals = []admin.UnusedApproval{{Node: "cp-3", EK: "sha256:ab", Until: now.Add(time.Hour)}}
	}},
	{"approvals/expired", "kleidi node approve cp-3 --ek sha256:ab", func(_ *testing.T, n *Node) {
		n.Nodes.Value.Approvals = []admin.UnusedApproval{{Node: "cp-3", EK: "sha256:ab", Until: now.Add(-time.Hour), Expired: true}}
	}},
	{"token/pin-locked", "--token-label kleidi --login --login-type so --init-pin", func(_ *testing.T, n *Node) {
		n.Token = is(credential.Token{Module: "/usr/lib/module.so", Label: "kleidi", Locked: true})
	}},
	{"token/pin-final-try", "one try left", func(_ *testing.T, n *Node) {
		n.Token = is(credential.Token{Module: "/usr/lib/module.so", Label: "kleidi", FinalTry: true, CountLow: true})
	}},
	{"token/pin-count-low", "--token-label 'our token' --login --list-objects", func(_ *testing.T, n *Node) {
		n.Token = is(credential.Token{Module: "/usr/lib/module.so", Label: "our token", CountLow: true})
	}},
	{"vault/token", `VAULT_ADDR=https://vault.example VAULT_TOKEN="$(cat /etc/kleidi/token)" vault token renew`, func(t *testing.T, n *Node) {
		n.vaultBy(t, &n.Config.Vault.Auth.TokenFile, "/etc/kleidi/token", "hvs.x\n")
		n.VaultToken = is(credential.VaultToken{Ends: now.Add(9 * time.Minute), Lives: time.Hour, Renewable: true})
	}},
	{"vault/token", "ends at 2026-11-14T12:00:00Z, and can't be renewed", func(t *testing.T, n *Node) {
		n.vaultBy(t, &n.Config.Vault.Auth.TokenFile, "/etc/kleidi/token", "hvs.x\n")
		n.VaultToken = is(credential.VaultToken{Ends: now.AddDate(0, 0, 13), Lives: 8760 * time.Hour})
	}},
	{"vault/token", "refuses the token", func(t *testing.T, n *Node) {
		n.vaultBy(t, &n.Config.Vault.Auth.TokenFile, "/etc/kleidi/token", "hvs.x\n")
		n.VaultToken = is(credential.VaultToken{Invalid: true})
	}},
	{"vault/token", "ends after 1 more use|", func(t *testing.T, n *Node) {
		n.vaultBy(t, &n.Config.Vault.Auth.TokenFile, "/etc/kleidi/token", "hvs.x\n")
		n.VaultToken = is(credential.VaultToken{Uses: 1})
	}},
	{"vault/jwt", "ends at 2026-11-01T12:09:00Z", func(t *testing.T, n *Node) { n.jwt(t, now.Add(-51*time.Minute), now.Add(9*time.Minute)) }},
	{"vault/jwt", "ends at 2026-11-01T11:59:00Z", func(t *testing.T, n *Node) { n.jwt(t, time.Unix(0, 0), now.Add(-time.Minute)) }},
	{"vault/jwt", "holds no JSON Web Token", func(t *testing.T, n *Node) {
		n.vaultBy(t, &n.Config.Vault.Auth.JWTFile, "/etc/kleidi/jwt", "hvs.x\n")
	}},
	{"vault/certificate", "begins with no certificate", func(t *testing.T, n *Node) {
		n.vaultBy(t, &n.Config.Vault.Auth.CertFile, "/etc/kleidi/vault.crt", "a key, maybe\n")
	}},
	{"vault/certificate", "vault.crt ends at 2026-11-02T12:00:00Z", func(t *testing.T, n *Node) {
		key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
		c := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.AddDate(0, -3, 0), NotAfter: now.AddDate(0, 0, 1)}
		der, err := x509.CreateCertificate(nil, c, c, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		n.vaultBy(t, &n.Config.Vault.Auth.CertFile, "/etc/kleidi/vault.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	}},
	{"clock/behind", "cp-2 started", func(_ *testing.T, n *Node) { n.Nodes.Value.Nodes[1].Record.Started = now.Add(time.Hour) }},
	{"clock/behind", "the keyring was changed at 2027", func(_ *testing.T, n *Node) { n.Status.Keys[0].Created = now.Add(9999 * time.Hour) }},
	{"clock/unsynchronised", "timedatectl", func(_ *testing.T, n *Node) { n.Synchronised = is(false) }},
	{"hooks/missing", "updates", func(t *testing.T, n *Node) { n.remove(t, "/usr/sbin/kleidi-next-boot") }},
	{"hooks/not-executable", "chmod 0755 /etc/kernel", func(t *testing.T, n *Node) { n.chmod(t, "/etc/kernel/postinst.d/zzz-kleidi", 0o644) }},
	{"hooks/not-called", "95-kleidi.install", func(t *testing.T, n *Node) { n.remove(t, "/etc/kernel/postinst.d/zzz-kleidi") }},
	{"hooks/not-called", "dpkg.cfg.d/kleidi", func(t *testing.T, n *Node) { n.remove(t, "/etc/dpkg/dpkg.cfg.d/kleidi") }},
	{"hooks/not-called", "dpkg.cfg.d/kleidi", func(t *testing.T, n *Node) {
		n.edit(t, "/etc/dpkg/dpkg.cfg.d/kleidi", "post-invoke", "#post-invoke")
	}},
	{"encryption-configuration/refused", "*.apps overlap", func(t *testing.T, n *Node) {
		n.edit(t, n.EncryptionConfig, "- secrets", "- deployments.apps\n      - '*.apps'")
	}},
	{"next-boot/unprepared", "kleidi-next-boot grub", func(t *testing.T, n *Node) { n.touch(t, "/boot/grub/grub.cfg", now) }},
	{"next-boot/unprepared", "uki /efi/EFI/Linux/next.efi", func(t *testing.T, n *Node) { n.write(t, "/efi/EFI/Linux/next.efi", "") }},
	{"next-boot/unprepared", "next.efi (its boot has other values in PCR 4, 11,", func(t *testing.T, n *Node) {
		n.write(t, "/efi/EFI/Linux/next.efi", "")
		n.addNext(Known[Next]{Value: &Next{Moved: []int{4, 11}}}) // the keyslot is for another boot
	}},
	{"next-boot/unprepared", "next.efi (its boot is not predicted: no image)", func(t *testing.T, n *Node) {
		n.write(t, "/efi/EFI/Linux/next.efi", "")
		n.Next = map[string]Known[Next]{"/efi/EFI/Linux/next.efi": {Why: "no image"}}
	}},
	{"leftovers/rotation", "--abort", func(_ *testing.T, n *Node) {
		n.Status.Keys = append(n.Status.Keys, admin.KeyReport{KeyID: "k1-b", Role: "staged", Created: now.Add(-25 * time.Hour)})
	}},
	{"leftovers/temporary", "rm /var/lib/kleidi/.keyring.json.tmp-A", func(t *testing.T, n *Node) {
		n.write(t, n.Config.State.Dir+"/.keyring.json.tmp-A", "")
		n.touch(t, n.Config.State.Dir+"/.keyring.json.tmp-A", now.Add(-2*time.Hour))
	}},
}

func (n *Node) addSlot(test *admin.SlotTest) {
	n.Status.Slots = append(n.Status.Slots, admin.SlotReport{Name: "vault", Type: seal.TypeVault, SelfTest: test})
}

func (n *Node) addNext(next Known[Next]) {
	n.Status.Slots = append(n.Status.Slots, admin.SlotReport{Name: "next", Type: seal.TypeTPM, Use: "next"})
	n.Next = map[string]Known[Next]{"/efi/EFI/Linux/next.efi": next}
}

// vaultBy makes kleidi log in to Vault with a file.
func (n *Node) vaultBy(t *testing.T, key *string, file, content string) {
	n.Config.Vault.Address, *key = "https://vault.example", file
	n.write(t, file, content)
}

// jwt makes kleidi log in to Vault with a token that lives from one time to another.
func (n *Node) jwt(t *testing.T, issued, ends time.Time) {
	claims := fmt.Sprintf(`{"iat":%d,"exp":%d}`, issued.Unix(), ends.Unix())
	n.vaultBy(t, &n.Config.Vault.Auth.JWTFile, "/etc/kleidi/jwt", "e30."+base64.RawURLEncoding.EncodeToString([]byte(claims))+".c2ln\n")
}

// outOfStep gives this node a reason not to follow the cluster store.
func (n *Node) outOfStep(cause seal.Cause, hint, message string) {
	n.Status.Cluster.InStep, n.Status.Cluster.Problem = false, &admin.Problem{Cause: cause, Hint: hint, Message: "the cluster store: " + message}
}

func (n *Node) runAs(t *testing.T, uid string) {
	n.edit(t, n.Manifest, "spec:\n", "spec:\n  securityContext: {runAsUser: "+uid+"}\n")
}

// TestFortyFaults: each check finds its fault, and no other check reports it.
func TestFortyFaults(t *testing.T) {
	for _, f := range faults {
		t.Run(f.id+"/"+f.want, func(t *testing.T) {
			n := healthy(t)
			f.plant(t, n)
			r := n.Examine()
			if len(r.Findings) != 1 || len(r.NotChecked) > 0 && !slices.Contains([]string{"configuration/refused", "tpm/silent", "event-log/unreadable"}, f.id) {
				t.Fatalf("%+v", r)
			}
			got := r.Findings[0]
			if got.ID != f.id || !strings.HasPrefix(f.id, got.Check+"/") || !strings.Contains(got.What+"|"+got.Why+"|"+got.Command, f.want) || got.Command == "" || got.Why == "" {
				t.Errorf("%+v", got)
			}
			if r.Healthy() != got.Note {
				t.Errorf("healthy: %v with %+v", r.Healthy(), got)
			}
			if out, err := exec.Command("sh", "-n", "-c", got.Command).CombinedOutput(); err != nil {
				t.Errorf("%q: %s", got.Command, out)
			}
			if !regexp.MustCompile(`^(chmod|rm) `).MatchString(got.Command) || f.id == "tpm-users/others" { // serve reports those users
				return
			}
			command := strings.ReplaceAll(got.Command, " /", " "+n.Root+"/")
			if out, err := exec.Command("sh", "-c", command).CombinedOutput(); err != nil {
				t.Fatalf("%s: %s", command, out)
			}
			if r := n.Examine(); len(r.Findings) > 0 {
				t.Errorf("after %s: %+v", command, r.Findings)
			}
		})
	}
}

// TestHealthy: nothing is found on a node without a fault, every check is made, and each
// kind of finding has a fault above.
func TestHealthy(t *testing.T) {
	r := healthy(t).Examine()
	if len(r.Findings) > 0 || len(r.NotChecked) > 0 || !r.Healthy() {
		t.Errorf("%+v", r)
	}
	var checked []string
	for id := range diagnosis.Kinds {
		check, _, _ := strings.Cut(id, "/")
		checked = append(checked, check)
		if !slices.ContainsFunc(faults, func(f fault) bool { return f.id == id }) {
			t.Errorf("no fault is planted for %s", id)
		}
	}
	for _, name := range r.Checks {
		if !slices.Contains(checked, name) {
			t.Errorf("%s finds nothing", name)
		}
	}
}

// TestCredentialsThatLast: what is renewed in time, or never ends, is no finding. What can't be
// known is said.
func TestCredentialsThatLast(t *testing.T) {
	for name, plant := range map[string]func(*Node){
		"a token that never ends": func(n *Node) { n.VaultToken = is(credential.VaultToken{}) },
		"a token with time left": func(n *Node) {
			n.VaultToken = is(credential.VaultToken{Ends: now.Add(11 * time.Minute), Lives: time.Hour})
		},
		"a JWT with time left":        func(n *Node) { n.jwt(t, now.Add(-49*time.Minute), now.Add(11*time.Minute)) },
		"a PIN that nobody mistyped":  func(n *Node) { n.Token = is(credential.Token{Module: "/usr/lib/module.so", Label: "kleidi"}) },
		"-a token that is not there":  func(n *Node) { n.Token.Why = "the token is not there" },
		"-a Vault that does not tell": func(n *Node) { n.VaultToken.Why = "permission denied" },
		"-a secret ID": func(n *Node) {
			n.Config.Vault.Auth.TokenFile = ""
			n.vaultBy(t, &n.Config.Vault.Auth.SecretIDFile, "/etc/kleidi/secret-id", "x\n")
		},
	} {
		n := healthy(t)
		n.vaultBy(t, &n.Config.Vault.Auth.TokenFile, "/etc/kleidi/token", "hvs.x\n")
		if strings.Contains(name, "JWT") {
			n.Config.Vault.Auth.TokenFile = ""
		}
		plant(n)
		if r := n.Examine(); len(r.Findings) > 0 || strings.HasPrefix(name, "-") != (len(r.NotChecked) == 1) {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// A printed command works as copied on a node whose configuration is elsewhere.
func TestConfigured(t *testing.T) {
	const elsewhere = "--config '/srv/my $1/kleidi.yaml' "
	n := &Node{ConfigFile: "/srv/my $1/kleidi.yaml"}
	for line, want := range map[string]string{
		"kleidi reseal": "kleidi " + elsewhere + "reseal",
		"systemctl restart kleidi && kleidi reseal   # see kleidi status": "systemctl restart kleidi && kleidi " + elsewhere + "reseal   # see kleidi status",
		"kleidi status   # on cp-2":                                       "kleidi status   # on cp-2",
		"chmod 600 /srv/kleidi x":                                         "chmod 600 /srv/kleidi x",
	} {
		if got := n.configured(line); got != want {
			t.Errorf("%s, want %s", got, want)
		}
		unasked := &Node{ConfigFile: "/etc/kleidi/config.yaml"}
		if got := unasked.configured(line); got != line {
			t.Errorf("%s, want it unchanged", got)
		}
	}
	n.NoConfig = "it is not YAML"
	if f := n.Examine().Findings; len(f) != 1 || f[0].Command != "kleidi "+elsewhere+"status   # repeat until it no longer complains of the configuration" {
		t.Errorf("%v", f)
	}
}
