package docs

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// Updates: a machine has the files from which it boots, a package manager that replaces
// them with the files of the next boot, and a reboot.

// beforeUpdate sets up a serving node with the hooks available. Its next boot is the
// present one after change.
func beforeUpdate(loader simboot.Loader, change func(*simboot.Boot)) func(*machine) {
	return func(m *machine) {
		m.boot = simboot.Baseline(loader)
		m.Reboot(m.boot)
		serving(m)
		m.next = m.boot
		change(&m.next)
		for _, dir := range []string{"boot/grub", "efi/EFI/Linux", "efi/EFI/systemd", "proc", "usr/local", "packages"} {
			if err := os.MkdirAll(m.root(dir), 0o755); err != nil {
				m.t.Fatal(err)
			}
		}
		m.write("efi/EFI/systemd/systemd-bootx64.efi", "systemd-boot 257.9", 0o644)
		m.copyHooks()
		m.write("bin/reboot", "#!/bin/sh\ntouch "+m.root("root/rebooting")+"\n", 0o755)
		m.write("bin/systemctl", fmt.Sprintf("#!/bin/sh\n[ \"$*\" = 'enable --now kleidi-booted' ] && exec %s booted\n", m.root(nextBoot)), 0o755)
		m.packages()
	}
}

const nextBoot = "usr/local/sbin/kleidi-next-boot"

// copyHooks puts the repository's hooks where the commands expect them, with the paths
// of this machine.
func (m *machine) copyHooks() {
	m.t.Helper()
	files, err := filepath.Glob(top + "deploy/hooks/*")
	if err != nil || len(files) == 0 {
		m.t.Fatal(err, files)
	}
	if err := os.MkdirAll(m.root("root/deploy/hooks"), 0o755); err != nil {
		m.t.Fatal(err)
	}
	for _, file := range files {
		text := read(m.t, file)
		for _, path := range []string{"/run/kleidi-hooks", "/sys/firmware", "/boot/", "/boot$path", "/efi/EFI", "/efi$path", "/proc/cmdline", "/etc/dpkg", "/usr/local/sbin"} {
			for _, before := range " =<:\"" {
				text = strings.ReplaceAll(text, string(before)+path, string(before)+m.base+path)
			}
		}
		m.write("root/deploy/hooks/"+filepath.Base(file), text, 0o755)
	}
}

// packages writes the files of the running boot. It makes apt-get and dnf install the
// files of the next boot and run the hooks, as the distributions' tools do.
func (m *machine) packages() {
	m.t.Helper()
	version := func(b simboot.Boot) string { v, _, _ := strings.Cut(b.Kernel, "+"); return v }
	files := func(b simboot.Boot) *simboot.Files {
		f, err := b.Files()
		if err != nil {
			m.t.Fatal(err)
		}
		return f
	}
	is, will := files(m.boot), files(m.next)
	m.write("media/usb/dbxupdate_x64.bin", string(will.DbxUpdate), 0o600)
	if m.boot.Loader == simboot.UKI {
		m.write("efi/EFI/Linux/linux-"+version(m.boot)+".efi", string(is.UKI), 0o644)
		m.write("efi/EFI/Linux/linux-"+version(m.next)+".efi", string(will.UKI), 0o644)
		m.write("bin/dnf", fmt.Sprintf(`#!/bin/sh
[ "$*" = upgrade ] || exit 1
KERNEL_INSTALL_LAYOUT=uki KERNEL_INSTALL_BOOT_ROOT=%s KERNEL_INSTALL_ENTRY_TOKEN=linux \
	exec %s add %s none none
`, m.root("efi"), m.root("etc/kernel/install.d/95-kleidi.install"), version(m.next)), 0o755)
		return
	}
	if m.boot.Loader == simboot.EFIStub {
		for b, f := range map[simboot.Boot]*simboot.Files{m.boot: is, m.next: will} {
			m.write("boot/vmlinuz-"+b.Kernel, string(f.Kernel), 0o644)
			m.write("boot/initrd.img-"+b.Kernel, string(f.Initrd), 0o644)
		}
		return
	}
	m.write("proc/cmdline", "BOOT_IMAGE=/boot/vmlinuz-"+m.boot.Kernel+" "+m.boot.CommandLine+"\n", 0o444)
	m.write("boot/vmlinuz-"+m.boot.Kernel, string(is.Kernel), 0o644)
	m.write("boot/initrd.img-"+m.boot.Kernel, string(is.Initrd), 0o644)
	m.write("boot/grub/grub.cfg", string(is.GRUBConfig), 0o644)
	m.write("packages/vmlinuz", string(will.Kernel), 0o644)
	m.write("packages/initrd", string(will.Initrd), 0o644)
	m.write("packages/grub.cfg", string(will.GRUBConfig), 0o644)
	m.write("bin/apt-get", fmt.Sprintf(`#!/bin/sh
[ "$*" = upgrade ] || exit 1
cd %s || exit 1
cp packages/vmlinuz boot/vmlinuz-%[2]s
cp packages/initrd boot/initrd.img-%[2]s
cp packages/grub.cfg boot/grub/grub.cfg
[ ! -f etc/dpkg/dpkg.cfg.d/kleidi ] || sed -n 's/^post-invoke=//p' etc/dpkg/dpkg.cfg.d/kleidi | sh
`, m.base, m.next.Kernel), 0o755)
}

// rebootIfAsked boots the result of the update, once a document's commands asked for a
// reboot.
func (m *machine) rebootIfAsked() {
	m.t.Helper()
	if !m.exists("root/rebooting") {
		return
	}
	m.remove("root/rebooting")
	m.remove("run/kleidi-hooks")
	m.stop()
	m.boot = m.next
	m.Reboot(m.boot)
	if m.exists(nextBoot) {
		m.must(m.root(nextBoot) + " booted")
	}
	m.serveIfPossible()
	node.Eventually(m.t, 2*time.Minute, "the clean-up is done", func() error {
		var r struct{ Slots []struct{ Use string } }
		if err := json.Unmarshal([]byte(m.must("sudo kleidi status --quick -o json 2>/dev/null")), &r); err != nil {
			return err
		}
		if slices.ContainsFunc(r.Slots, func(s struct{ Use string }) bool { return s.Use == "next" }) {
			return fmt.Errorf("there is a slot for a next boot: %+v", r.Slots)
		}
		return nil
	})
}
