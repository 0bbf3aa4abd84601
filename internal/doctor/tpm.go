package doctor

import (
	"strings"

	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
	"github.com/beezy-dev/kleidi/seal"
)

// usesTPM reports whether a TPM opens the keyring at start.
func (n *Node) usesTPM() bool {
	return strings.Contains(strings.Join(n.Config.Unlock.Order, " "), seal.TypeTPM)
}

// devicePath returns the file of the TPM device, or "" if there is none.
func (n *Node) devicePath() string {
	device := n.Config.TPM.Device
	if strings.HasPrefix(device, "tcp:") {
		return ""
	}
	return strings.TrimPrefix(device, "unix:")
}

// versionFile is the file in which Linux reports the version of the first TPM.
const versionFile = "/sys/class/tpm/tpm0/tpm_version_major"

func tpmThere(n *Node) []diagnosis.Finding {
	device := n.devicePath()
	switch {
	case !n.usesTPM():
		return nil
	case n.line(versionFile) == "1" && strings.HasPrefix(device, "/dev/"):
		return diagnosis.Found("tpm/version-1.2", "cat "+versionFile+"   # 2 is wanted: choose TPM 2.0 in the firmware's settings", "the machine's TPM is a TPM 1.2")
	case device != "" && !n.exists(device):
		return diagnosis.Found("tpm/missing", "ls /dev/tpm*   # none: switch the TPM on in the firmware's settings; another: set tpm.device", "there is no %s", device)
	case n.TPM.Value == nil && n.TPM.Why != "":
		return diagnosis.Found("tpm/silent", "systemctl restart kleidi   # if it stays silent, reset the machine; journalctl -k shows what the driver says", "the TPM %s does not answer: %s", n.Config.TPM.Device, n.TPM.Why)
	case n.TPM.Value == nil:
		return nil
	case n.TPM.Value.InLockout:
		return diagnosis.Found("tpm/lockout", "tpm2_dictionarylockout --clear-lockout", "the TPM is locked out after %s", seal.Count(int(n.TPM.Value.Failed), "wrong authorization"))
	case n.TPM.Value.Failed > 0:
		return diagnosis.Found("tpm/wrong-authorizations", "tpm2_dictionarylockout --clear-lockout", "the TPM has counted %s; it locks itself out at %d", seal.Count(int(n.TPM.Value.Failed), "wrong authorization"), n.TPM.Value.Most)
	}
	return nil
}

func tpmUsers(n *Node) []diagnosis.Finding {
	if n.Status.TPMOpenTo == "" {
		return nil
	}
	return diagnosis.Found("tpm-users/others", "chmod 0600 "+n.devicePath()+"   # and a udev rule, so that it stays so after the next boot", "the TPM is open to %s", n.Status.TPMOpenTo)
}

func ownerAuthorization(n *Node) []diagnosis.Finding {
	switch {
	case !n.usesTPM():
		return nil
	case n.TPM.Value == nil:
		return diagnosis.NotChecked("the TPM did not say whether its owner authorization is empty")
	case n.TPM.Value.OwnerAuthSet:
		return nil
	}
	return diagnosis.Found("owner-authorization/empty", `(umask 077; openssl rand -hex 16 | tr -d '\n' >/etc/kleidi/owner-auth); tpm2_changeauth -c owner file:/etc/kleidi/owner-auth   # then tpm.ownerAuthFile: /etc/kleidi/owner-auth, and a restart`, "the TPM's owner authorization is empty")
}
