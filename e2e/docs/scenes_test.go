package docs

import (
	"context"
	"os"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// scenes are the starting points of the documents' tasks.
var scenes = map[string]func(*machine){
	"a machine without a keyring": func(*machine) {},
	"a serving node":              serving,
	"a node that booted another kernel": func(m *machine) {
		serving(m)
		m.stop()
		m.boot.Kernel = "6.12.63+deb13-amd64"
		m.Reboot(m.boot)
	},
	"a serving node that boots GRUB": func(m *machine) {
		m.boot = simboot.Baseline(simboot.GRUB)
		m.Reboot(m.boot)
		serving(m)
	},
	"a serving UKI host before an update":                          beforeUpdate(simboot.UKI, newKernel),
	"a serving UKI host before an update of dbx":                   beforeUpdate(simboot.UKI, newDbx),
	"a serving UKI host before an update of the kernel and of dbx": beforeUpdate(simboot.UKI, func(b *simboot.Boot) { newKernel(b); newDbx(b) }),
	"a serving UKI host before a firmware update":                  beforeUpdate(simboot.UKI, func(b *simboot.Boot) { b.Firmware = "edk2 2026.02"; newDbx(b) }),
	"a serving EFI-stub host before an update":                     beforeUpdate(simboot.EFIStub, newKernel),
	"a serving GRUB host before an update":                         beforeUpdate(simboot.GRUB, newKernel),
	"a node with a boot policy whose firmware was updated": func(m *machine) {
		serving(m)
		m.must("kleidi bootpolicy record --file /etc/kleidi/boot-policy.yaml")
		m.stop()
		m.boot.Firmware = "edk2 2026.02"
		m.Reboot(m.boot)
	},
	"a node with another TPM": func(m *machine) {
		serving(m)
		m.otherTPM()
	},
	"a new machine with a backup": func(m *machine) {
		serving(m)
		m.otherTPM()
		m.remove("var/lib/kleidi")
	},
	"a node whose TPM was cleared": func(m *machine) {
		serving(m)
		m.stop()
		m.clear()
	},
	"a node whose keyring is damaged": func(m *machine) {
		serving(m)
		m.stop()
		if err := os.Truncate(m.root("var/lib/kleidi/keyring.json"), 1000); err != nil {
			m.t.Fatal(err)
		}
	},
	"a node whose keyring was lost while kleidi holds it open": func(m *machine) {
		serving(m)
		m.remove("var/lib/kleidi/keyring.json")
	},
	"a node that booted another kernel, with a token as its fallback": func(m *machine) {
		withToken("[tpm, pkcs11]", true)(m)
		m.bootOther()
	},
	"a node with another TPM, and a token as its fallback": func(m *machine) {
		withToken("[tpm, pkcs11]", true)(m)
		m.otherTPM()
	},
	"a serving node whose token is away": func(m *machine) {
		withToken("[tpm, pkcs11]", true)(m)
		m.must("mv " + m.root(tokens) + " " + m.root("away"))
	},
	"a serving node whose token is lost": func(m *machine) {
		withToken("[tpm, pkcs11]", true)(m)
		m.remove(tokens)
	},
	"a serving node without a TPM, with a new token": func(m *machine) {
		withToken("[pkcs11]", false)(m)
		m.newToken()
	},
	"a locked node without a TPM, with a new token": func(m *machine) {
		withToken("[pkcs11]", false)(m)
		m.stop()
		m.newToken()
	},
	"a serving node with the sources, and SoftHSM": func(m *machine) {
		m.emptySoftHSM()
		m.sources()
		serving(m)
	},
	"a serving node with a token as its fallback": withToken("[tpm, pkcs11]", true),
	"a serving node with an empty token": func(m *machine) {
		m.buildPKCS11()
		m.newToken()
		serving(m)
	},
	"a machine without a TPM, with a token": func(m *machine) {
		m.noTPM = true
		m.buildPKCS11()
		m.newToken()
	},
	"a machine without a keyring, with a key in a token": withKey,
	"a two-of-two machine without a keyring": func(m *machine) {
		withKey(m)
		m.set("unlock: {order: [tpm-and-pkcs11]}\n" + tokenSettings)
	},
	"a two-of-two node with another TPM": func(m *machine) {
		withKey(m)
		m.set("unlock: {order: [tpm-and-pkcs11]}\n" + tokenSettings)
		m.must(`age-keygen -o /media/usb/kleidi-recovery.txt
kleidi init --break-two-of-two --recovery-recipient "$(age-keygen -y /media/usb/kleidi-recovery.txt)"`)
		m.serveIfPossible()
		m.encryptSeed()
		m.otherTPM()
	},
	"a node of kleidi 1.x": legacy,
	"a node of kleidi 1.x without a TPM": func(m *machine) {
		m.noTPM = true
		legacy(m)
	},
	"a serving node whose token is back after a rotation without it": func(m *machine) {
		withToken("[tpm, pkcs11]", true)(m)
		m.must("mv " + m.root(tokens) + " " + m.root("away"))
		m.must("kleidi rotate --skip-slot pkcs11")
		m.must("mv " + m.root("away") + " " + m.root(tokens))
	},
	"a new machine beside a serving seat": func(m *machine) {
		m.beside(serving)
	},
	"a new machine beside a seat that answers joins": func(m *machine) {
		m.besideAnswering()
		m.inMemory()
		m.seat().write("root/join.yaml", "token: abcdef.0123456789abcdef\n", 0o600)
	},
	"the seat of a cluster with a token, beside a machine without a TPM": func(m *machine) {
		withToken("[tpm, pkcs11]", true)(m)
		next := newMachine(m.t)
		next.noTPM, next.binary = true, m.binary
		next.writeKleidi()
		next.write("etc/kleidi/pkcs11.pin", read(m.t, m.root("etc/kleidi/pkcs11.pin")), 0o600)
		next.settings["pkcs11"] = m.settings["pkcs11"]
		m.meet(next, "cp-3")
	},
	"a node whose disk was lost, and the seat": func(m *machine) {
		m.besideAnswering()
		m.joinSeat()
		m.stop()
		m.remove("var/lib/kleidi")
		m.makeFolders()
	},
	"two nodes that share a cluster store": func(m *machine) { share(m, newMachine(m.t)) },
	"cp-1, whose rotation waits for cp-2": func(m *machine) {
		second := newMachine(m.t)
		share(m, second)
		stage(m, second)
	},
	"cp-2, while cp-1 is down, which drives a rotation": func(m *machine) {
		first := newMachine(m.t)
		share(first, m)
		stage(first, m)
		first.stop()
	},
	"a node whose anchor is lost": func(m *machine) {
		serving(m)
		m.stop()
		m.remove("var/lib/kleidi/anchor.json")
	},
}

func newKernel(b *simboot.Boot) {
	b.Kernel, b.Initrd = "6.12.63+deb13-amd64", "dracut 106, built for 6.12.63"
}

func newDbx(b *simboot.Boot) { b.Dbx += ",2025-10-14" }

// serving is a node after README's commands, rotated once, with a backup.
func serving(m *machine) {
	m.must(`age-keygen -o /media/usb/kleidi-recovery.txt
kleidi init --recovery-recipient "$(age-keygen -y /media/usb/kleidi-recovery.txt)"`)
	m.serveIfPossible()
	m.must("kleidi rotate && kleidi keyring backup /media/usb/keyring.json")
	m.encryptSeed()
}

// otherTPM puts another TPM into the machine, as a new mainboard does.
func (m *machine) otherTPM() {
	m.stop()
	m.Machine = tpmtest.New(m.t, m.boot)
	m.configure()
}

// clear does the same as the firmware's "clear TPM".
func (m *machine) clear() {
	err := m.TPM().Do(context.Background(), func(t transport.TPM) error {
		_, err := tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}.Execute(t)
		return err
	})
	if err != nil {
		m.t.Fatal(err)
	}
	m.Reboot(m.boot)
}
