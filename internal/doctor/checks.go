package doctor

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/kubeadm"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
)

// check finds one kind of fault.
type check struct {
	name string
	find func(*Node) []Finding
}

// checks are in the order in which an operator mends faults: what the others depend on is
// first.
var checks = []check{
	{"tpm", tpmThere},
	{"tpm-users", tpmUsers},
	{"event-log", eventLog},
	{"folders", folders},
	{"serve", serving},
	{"version", version},
	{"keyring", open},
	{"keyslots", keyslots},
	{"recovery", recoverySlot},
	{"suspension", suspension},
	{"debts", debts},
	{"changed-outside", changedOutside},
	{"memory", memory},
	{"encryption-configuration", encryptionConfiguration},
	{"kube-apiserver", apiserver},
	{"hooks", hooks},
}

func one(what, why, command string) []Finding {
	return []Finding{{What: what, Why: why, Command: command}}
}

func note(what, why, command string) []Finding {
	return []Finding{{Note: true, What: what, Why: why, Command: command}}
}

// usesTPM reports whether a TPM opens the keyring at start.
func (n *Node) usesTPM() bool {
	return strings.Contains(strings.Join(n.Config.Unlock.Order, " "), seal.TypeTPM)
}

func tpmThere(n *Node) []Finding {
	device := strings.TrimPrefix(n.Config.TPM.Device, "unix:")
	if !n.usesTPM() || strings.HasPrefix(device, "tcp:") || n.exists(device) {
		return nil
	}
	return one("there is no "+device, "the KEK is sealed in the TPM: without it only the recovery identity opens the keyring",
		"ls /dev/tpm*   # none: switch the TPM on in the firmware's settings; another: set tpm.device")
}

func tpmUsers(n *Node) []Finding {
	if n.Status.TPMOpenTo == "" {
		return nil
	}
	return one("the TPM is open to "+n.Status.TPMOpenTo, "with a copy of the keyring they get the KEK",
		"ls -l "+strings.TrimPrefix(n.Config.TPM.Device, "unix:")+"   # then take the group or the mode away with a udev rule")
}

func eventLog(n *Node) []Finding {
	if !n.usesTPM() || n.exists(n.Config.TPM.EventLog) {
		return nil
	}
	return one("there is no event log "+n.Config.TPM.EventLog, "kleidi attests each boot by its event log, and opens nothing without it",
		"mount -t securityfs securityfs /sys/kernel/security   # still none: boot in UEFI mode")
}

func folders(n *Node) (found []Finding) {
	for _, dir := range []string{filepath.Dir(n.Config.KMS.Socket), n.Config.State.Dir} {
		if !n.exists(dir) {
			found = append(found, Finding{What: "there is no folder " + dir, Why: "kleidi serve makes its sockets and its state there", Command: "systemd-tmpfiles --create kleidi.conf"})
		}
	}
	return found
}

func serving(n *Node) []Finding {
	if !n.Serving {
		return one("kleidi serve does not run", "kube-apiserver can't read or write Secrets", "systemctl enable --now kleidi   # if it ends again: journalctl -u kleidi")
	}
	if !n.exists(n.Config.KMS.Socket) {
		return one("kleidi serve runs, but "+n.Config.KMS.Socket+" is not there", "kube-apiserver finds no plugin", "systemctl restart kleidi")
	}
	return nil
}

func version(n *Node) []Finding {
	if !n.Serving || n.Status.Version == n.Version {
		return nil
	}
	return one(fmt.Sprintf("kleidi serve is version %s, and the installed one is %s", n.Status.Version, n.Version), "an update does its work only after a restart; kube-apiserver's calls wait meanwhile",
		"systemctl restart kleidi")
}

func open(n *Node) []Finding {
	// Without a cause the problem is that serve does not run, which another check says.
	if n.Status.Problem == nil && n.Status.Fallback == nil || !n.Serving && n.Status.Problem.Cause == "" {
		return nil
	}
	why := "kube-apiserver can't read or write Secrets"
	if n.Status.State == admin.Open {
		why = "the keyring is open now, and may not open at the next start"
	}
	problem := n.Status.Problem
	if problem == nil {
		problem = n.Status.Fallback
	}
	return one(told(problem), why, remedy(problem, "kleidi status"))
}

func keyslots(n *Node) (found []Finding) {
	for _, s := range n.Status.Slots {
		if s.Problem != nil && (n.Status.Problem == nil || s.Problem.Message != n.Status.Problem.Message) {
			found = append(found, Finding{What: "keyslot " + s.Name + " does not open: " + told(s.Problem), Why: "one way fewer leads to the KEK", Command: remedy(s.Problem, "kleidi slot list")})
		}
	}
	return found
}

func recoverySlot(n *Node) []Finding {
	if len(n.Status.Slots) == 0 {
		return nil
	}
	for _, s := range n.Status.Slots {
		if s.Type == seal.TypeRecovery {
			return nil
		}
	}
	return note("there is no recovery slot", "if the TPM fails, or the machine boots otherwise, every Secret is lost", "kleidi slot add recovery --recipient RECIPIENT")
}

func suspension(n *Node) []Finding {
	if n.Status.Suspension == nil {
		return nil
	}
	return one("this node is suspended", n.Status.Suspension.String(), "kleidi reseal")
}

func debts(n *Node) (found []Finding) {
	for _, d := range n.Status.Unrevoked {
		found = append(found, Finding{What: d.Message, Why: "whoever kept a copy of them and boots as they demand gets the KEK", Command: d.Hint})
	}
	return found
}

func changedOutside(n *Node) []Finding {
	if len(n.Status.ChangedOutside) == 0 {
		return nil
	}
	return one(fmt.Sprintf("%d slots were added or removed by no command on this node", len(n.Status.ChangedOutside)), "whoever wrote them may have a way to the KEK", slotview.HintOutside)
}

func memory(n *Node) []Finding {
	const why = "swapped memory ends up on the disk, where the TPM does not protect it"
	if n.Status.Memory == "unlocked" {
		return one("the KEK lies in memory that is not locked", why, "systemctl show -P LimitMEMLOCK kleidi   # make it infinity")
	}
	swaps, _ := os.ReadFile(n.path("/proc/swaps"))
	if n.Config.Memory.Lock == config.LockBestEffort && bytes.Count(swaps, []byte("\n")) > 1 {
		return one("swap is on, and memory.lock is best-effort", why, "swapoff -a")
	}
	return nil
}

func encryptionConfiguration(n *Node) []Finding {
	b, err := files.Read(n.path(n.EncryptionConfig), 1<<20)
	if os.IsNotExist(err) {
		return one("there is no "+n.EncryptionConfig, "kube-apiserver encrypts nothing with kleidi", "kleidi encryption-config --file "+n.EncryptionConfig)
	}
	var e *encryptionconfig.EncryptionConfiguration
	if err == nil {
		e, err = encryptionconfig.Parse(b)
	}
	if err != nil {
		return one(fmt.Sprintf("%s: %v", n.EncryptionConfig, err), "kube-apiserver does not start with it", "kleidi encryption-config   # prints a good one")
	}
	c := n.Config.KMS
	if !e.Encrypts(c.Name) {
		return one("in "+n.EncryptionConfig+" kleidi's provider is first for no resource", "kube-apiserver writes with the first provider, so it encrypts nothing with kleidi", "kleidi encryption-config   # put its provider first")
	}
	var found []Finding
	if e.EncryptsStore() {
		found = one(n.EncryptionConfig+" encrypts the cluster store", "a node could read the shared keyring only with a KEK that is in it",
			"kleidi encryption-config   # with --resources '*.*' it prints the entry that must stand first")
	}
	for _, r := range e.Resources {
		if r.Own() {
			continue
		}
		for _, p := range r.Providers {
			if p.KMS != nil && p.KMS.Name == c.Name && p.KMS.Endpoint != "unix://"+c.Socket {
				found = append(found, one(fmt.Sprintf("%s names the socket %s, and kleidi serves unix://%s", n.EncryptionConfig, p.KMS.Endpoint, c.Socket), "kube-apiserver asks nobody", "kleidi encryption-config   # prints the endpoint")...)
			}
			if p.Identity != nil {
				found = append(found, note(n.EncryptionConfig+" still reads what is stored in clear (identity)", "whoever writes to etcd can plant a Secret in clear, and kube-apiserver takes it",
					"kleidi migrate   # then remove the provider identity")...)
			}
		}
	}
	return found
}

// apiserver looks only where kubeadm runs kube-apiserver.
func apiserver(n *Node) []Finding {
	b, err := files.Read(n.path(n.Manifest), 1<<20)
	if err != nil {
		return nil
	}
	patched, err := kubeadm.Patch{EncryptionConfig: n.EncryptionConfig, Socket: n.Config.KMS.Socket}.Apply(b)
	what := n.Manifest + " does not name kleidi's EncryptionConfiguration, or does not mount it and the folder of the socket"
	if err != nil {
		what = fmt.Sprintf("%s: %v", n.Manifest, err)
	} else if bytes.Equal(patched, b) {
		return nil
	}
	return one(what, "kube-apiserver does not ask kleidi", "kleidi kubeadm patch --apply --encryption-config "+n.EncryptionConfig)
}

func hooks(n *Node) []Finding {
	if !n.usesTPM() || n.exists("/usr/sbin/kleidi-next-boot") || n.exists("/usr/local/sbin/kleidi-next-boot") {
		return nil
	}
	return note("no hook for kernel updates is installed", "after an update the next boot is locked, unless kleidi reseal was told of it", "install the package of kleidi, or see docs/updates.md")
}

// told is a problem in one line.
func told(p *admin.Problem) string {
	return strings.Join(append([]string{p.Message}, p.Details...), "; ")
}

func remedy(p *admin.Problem, otherwise string) string {
	if p.Hint == "" {
		return otherwise
	}
	return p.Hint
}
