package docs

import (
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// installHooks are the commands of docs/updates.md for Debian.
const installHooks = `install -D -m 0755 deploy/hooks/kleidi-next-boot /usr/local/sbin/kleidi-next-boot
install -D -m 0755 deploy/hooks/zzz-kleidi /etc/initramfs/post-update.d/zzz-kleidi
install -D -m 0755 deploy/hooks/95-kleidi.install /etc/kernel/install.d/95-kleidi.install
install -D -m 0644 deploy/hooks/dpkg.cfg /etc/dpkg/dpkg.cfg.d/kleidi
systemctl enable --now kleidi-booted`

// TestHookRefused: if the next boot can't be predicted, the packages are still installed,
// and the hook's advice keeps the node open.
func TestHookRefused(t *testing.T) {
	m := newMachine(t)
	beforeUpdate(simboot.GRUB, newKernel)(m)
	m.must(installHooks)
	m.write("packages/grub.cfg", read(t, m.root("packages/grub.cfg"))+"menuentry 'one more' {\n}\n", 0o644)
	out := m.must("apt-get upgrade 2>&1")
	for _, says := range []string{"THE NEXT BOOT IS NOT PREPARED", "the new grub.cfg has other entries than the running one", "kleidi suspend --boots 1"} {
		if !strings.Contains(out, says) {
			t.Errorf("it does not say %q:\n%s", says, out)
		}
	}
	if read(t, m.root("boot/grub/grub.cfg")) != read(t, m.root("packages/grub.cfg")) {
		t.Error("the update was not installed")
	}
	m.must("kleidi suspend --boots 1")
	if out := m.must("kleidi-next-boot grub 2>&1"); !strings.Contains(out, "This node is suspended") {
		t.Errorf("while suspended it says:\n%s", out)
	}
	m.must("reboot")
	m.rebootIfAsked()
	m.checkNothingLost()
	m.must("kleidi reseal")
	if out := m.must("kleidi status"); strings.Contains(out, "SUSPENDED") {
		t.Errorf("still suspended:\n%s", out)
	}
}

// TestHookOfInitrd: an initrd is rebuilt without a package.
func TestHookOfInitrd(t *testing.T) {
	m := newMachine(t)
	beforeUpdate(simboot.GRUB, func(b *simboot.Boot) { b.Initrd = "dracut 106, rebuilt" })(m)
	m.must(installHooks)
	out := m.must("cp ../packages/initrd /boot/initrd.img-" + m.boot.Kernel + " && /etc/initramfs/post-update.d/zzz-kleidi 2>&1")
	if !strings.Contains(out, "the next boot is prepared") {
		t.Errorf("it says:\n%s", out)
	}
	m.must("reboot")
	m.rebootIfAsked()
	m.checkNothingLost()
}

// TestHookOnOtherMachines: without a keyring the hook prints nothing.
func TestHookOnOtherMachines(t *testing.T) {
	m := newMachine(t)
	beforeUpdate(simboot.GRUB, newKernel)(m)
	m.must(installHooks)
	m.stop()
	m.remove("var/lib/kleidi")
	if out := m.must("apt-get upgrade 2>&1; kleidi-next-boot grub 2>&1; kleidi-next-boot uki /nothing 2>&1"); out != "" {
		t.Errorf("it says:\n%s", out)
	}
}
