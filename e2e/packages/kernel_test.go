package packages

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/nspawn"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// These tests update the machine's kernel with the real apt, dpkg, run-parts and
// kernel-install. The packages of kernels are the tests' own, with Debian's script of a
// kernel package. Small scripts stand in for what the machine lacks: ukify,
// update-initramfs and update-grub.

// updating bounds a run of apt on a busy machine.
const updating = 5 * time.Minute

const (
	prepared    = "kleidi: the next boot is prepared: "
	notPrepared = "kleidi: THE NEXT BOOT IS NOT PREPARED: "
)

// pkg is a Debian package.
type pkg struct {
	name, postinst, postrm, triggers string
	files                            map[string][]byte
}

// build makes the package in the machine's /root, and returns the command to install it.
func (p pkg) build(t *testing.T, m *nspawn.Machine) string {
	t.Helper()
	dir := t.TempDir()
	files := maps.Clone(p.files)
	if files == nil {
		files = map[string][]byte{}
	}
	files["DEBIAN/control"] = fmt.Appendf(nil, "Package: %s\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: test\n", p.name)
	files["DEBIAN/triggers"] = []byte(p.triggers)
	for name, script := range map[string]string{"postinst": p.postinst, "postrm": p.postrm} {
		files["DEBIAN/"+name] = []byte("#!/bin/sh\nset -e\n" + script)
	}
	for path, content := range files {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	nspawn.Run(t, "dpkg-deb", "--root-owner-group", "--build", dir, m.Path("root/"+p.name+".deb"))
	return "apt-get install -y --reinstall ./" + p.name + ".deb 2>&1"
}

// kernelPackage is a kernel's package. Its scripts call the hooks in /etc/kernel as those
// of Debian's do.
func kernelPackage(t *testing.T, b simboot.Boot) pkg {
	t.Helper()
	f := filesOf(t, b)
	hooks := func(kind string) string {
		return fmt.Sprintf("[ ! -d /etc/kernel/%s.d ] || DEB_MAINT_PARAMS=\"$*\" run-parts --report --exit-on-error --arg=%s --arg=/boot/vmlinuz-%[2]s /etc/kernel/%[1]s.d\n", kind, b.Kernel)
	}
	p := pkg{name: "linux-image-" + strings.ReplaceAll(b.Kernel, "_", "-"), postinst: hooks("postinst"), postrm: hooks("postrm"), files: map[string][]byte{}}
	if b.Loader == simboot.UKI {
		p.files["usr/lib/linux/"+b.Kernel+".efi"], p.files["boot/vmlinuz-"+b.Kernel] = f.UKI, []byte(b.Kernel)
	} else {
		p.files["usr/lib/linux/"+b.Kernel+".initrd"], p.files["boot/vmlinuz-"+b.Kernel] = f.Initrd, f.Kernel
	}
	return p
}

func filesOf(t *testing.T, b simboot.Boot) *simboot.Files {
	t.Helper()
	f, err := b.Files()
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// withKernel is a boot after an update of the kernel.
func withKernel(l simboot.Loader, version string) simboot.Boot {
	b := simboot.Baseline(l)
	b.Kernel = version
	return b
}

// script writes a script of the machine.
func script(m *nspawn.Machine, path, text string) {
	m.Write(path, "#!/bin/sh\nset -e\n"+text)
	m.Sh("chmod 755 /" + path)
}

// reboot shuts the machine down, and boots it.
func reboot(m *nspawn.Machine, b simboot.Boot) {
	m.PowerOff()
	m.TPM.Reboot(b)
	m.Boot()
}

// update runs a command of the package manager, which must succeed. The last message of
// kleidi's hooks contains the given words; without words there is none. apt runs dpkg more
// than once, and each run ends with a message if files of the boot have changed.
func update(t *testing.T, m *nspawn.Machine, command, says string) {
	t.Helper()
	out := m.ShFor(updating, command)
	if broken := m.Sh("dpkg --audit"); broken != "" {
		t.Errorf("%s: dpkg --audit: %s", command, broken)
	}
	last := max(strings.LastIndex(out, prepared), strings.LastIndex(out, notPrepared))
	if says == "" && last >= 0 || says != "" && (last < 0 || !strings.Contains(out[last:], says)) {
		t.Errorf("%s: its last message is not %q:\n%s", command, says, out)
	}
}

// status is what kleidi status shows.
type status struct {
	State      string
	Wrapper    string
	Suspension *struct{ BootsLeft int }
	Slots      []struct{ Type, Use string }
}

func statusOf(t *testing.T, m *nspawn.Machine) (s status) {
	t.Helper()
	out, err := m.Try("kleidi status -o json 2>/dev/null") // the exit code tells of slots that do not open, and stderr may tell of waiting
	if wrong := json.Unmarshal([]byte(out), &s); wrong != nil {
		t.Fatalf("kleidi status: %v, %v: %s", err, wrong, out)
	}
	return s
}

// opens waits until this boot has opened the keyring, and until the clean-up after that
// has left no slot for a next boot.
func opens(t *testing.T, m *nspawn.Machine) {
	t.Helper()
	node.Eventually(t, 2*time.Minute, "the keyring is open, and only for this boot", func() error {
		if s := statusOf(t, m); s.State != "open" || s.next() != 0 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

// next counts the slots for a next boot.
func (s status) next() (n int) {
	for _, slot := range s.Slots {
		if slot.Use == "next" {
			n++
		}
	}
	return n
}

// systemdBoot lays out the machine's disk: a system partition with systemd-boot and the
// image that booted.
func systemdBoot(t *testing.T, m *nspawn.Machine) {
	b := simboot.Baseline(simboot.UKI)
	m.Write("boot/EFI/systemd/systemd-bootx64.efi", "systemd-boot 257.9")
	m.Write("boot/EFI/Linux/debian-"+b.Kernel+".efi", string(filesOf(t, b).UKI))
	m.Sh("find /boot -type f -exec touch -d '1 year ago' {} +")
	m.Write("etc/kernel/entry-token", "debian\n")
	m.Write("etc/kernel/install.conf", "layout=uki\n")
	script(m, "etc/kernel/install.d/60-ukify.install", `[ "$1" != add ] || cp "/usr/lib/linux/$2.efi" "$KERNEL_INSTALL_STAGING_AREA/uki.efi"`+"\n")
	script(m, "etc/kernel/postinst.d/zz-systemd-boot", `kernel-install add "$1" "$2"`+"\n")
	script(m, "etc/kernel/postrm.d/zz-systemd-boot", `kernel-install remove "$1"`+"\n")
}

// kernelsOfSystemdBoot: updates of a unified kernel image.
func kernelsOfSystemdBoot(t *testing.T, m *nspawn.Machine) {
	install := func(version string, more map[string][]byte) string {
		p := kernelPackage(t, withKernel(simboot.UKI, version))
		maps.Copy(p.files, more)
		return p.build(t, m)
	}
	image := func(version string) string { return "/boot/EFI/Linux/debian-" + version + ".efi" }

	// dpkg's last step prepares the next boot, not the hook of kernel-install
	update(t, m, install("6.99.1", nil), prepared+image("6.99.1"))
	if s := statusOf(t, m); s.next() != 1 {
		t.Errorf("%+v", s)
	}
	reboot(m, withKernel(simboot.UKI, "6.99.1"))
	opens(t, m)

	// Without dpkg, the hook of kernel-install prepares it
	update(t, m, "kernel-install -v add 6.99.1 /boot/vmlinuz-6.99.1 2>&1", prepared+image("6.99.1"))
	update(t, m, "kernel-install -v remove 6.99.1 2>&1", "")
	m.Sh("kleidi reseal --drop-next")

	// A kleidi that fails breaks no package
	for what, c := range map[string]struct{ fail, mend, says string }{
		"crash":         {"mv /usr/bin/kleidi kleidi; printf '#!/bin/sh\\nkill -SEGV $$\\n' >/usr/bin/kleidi; chmod 755 /usr/bin/kleidi", "mv kleidi /usr/bin/kleidi", notPrepared + image("6.99.2") + ": "},
		"configuration": {"cp -p /etc/kleidi/config.yaml config.yaml; echo nonsense: true >>/etc/kleidi/config.yaml", "mv config.yaml /etc/kleidi/config.yaml", "nonsense"},
		"no TPM":        {"sed -i 's|/tpm.sock|/no.sock|' /etc/kleidi/config.yaml; systemctl stop kleidi", "sed -i 's|/no.sock|/tpm.sock|' /etc/kleidi/config.yaml; systemctl start kleidi", notPrepared + image("6.99.2") + ": "},
		"no script":     {"mv /usr/sbin/kleidi-next-boot next-boot", "mv next-boot /usr/sbin/kleidi-next-boot", ""},
		"no kleidi":     {"mv /usr/bin/kleidi kleidi", "mv kleidi /usr/bin/kleidi", ""},
	} {
		t.Run(what, func(t *testing.T) {
			m := m.With(t)
			m.Sh("rm -f " + image("6.99.2") + "; " + c.fail)
			update(t, m, install("6.99.2", nil), c.says)
			m.Sh(c.mend + "; test -s " + image("6.99.2"))
			if s := statusOf(t, m); s.next() != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
	update(t, m, install("6.99.2", nil), prepared+image("6.99.2"))

	// The boot loader comes with the kernel. It can't be predicted.
	update(t, m, install("6.99.3", map[string][]byte{"boot/EFI/systemd/systemd-bootx64.efi": []byte("systemd-boot 258")}), "the boot loader has changed")
	if out := m.Sh("journalctl --sync; journalctl --no-pager -t kleidi -p err -n 1"); !strings.Contains(out, "the boot loader has changed") {
		t.Errorf("journal: %s", out)
	}
	m.Sh("kleidi suspend --boots 1")
	if out := m.Sh("kleidi-next-boot uki " + image("6.99.3") + " 2>&1"); !strings.Contains(out, "This node is suspended") {
		t.Errorf("while suspended it says:\n%s", out)
	}
	reboot(m, withKernel(simboot.UKI, "6.99.3"))
	if s := statusOf(t, m); s.State != "open" || s.Suspension == nil {
		t.Errorf("after the reboot: %+v", s)
	}
	m.Sh("kleidi reseal")
	if s := statusOf(t, m); s.State != "open" || s.Suspension != nil {
		t.Errorf("after kleidi reseal: %+v", s)
	}
}

// kernelsOfGRUB: updates of a kernel and of an initrd for GRUB, on the machine after its
// purge.
func kernelsOfGRUB(t *testing.T, m *nspawn.Machine) {
	const grubConfig = "boot/grub/grub.cfg"
	m.Sh("rm -rf /boot/* /etc/kernel/*.d/*systemd-boot /etc/kernel/install.d/*")
	updateGRUB := "cp /root/next.cfg /" + grubConfig + "\n"
	updateInitramfs := `cp "$source" "/boot/initrd.img-$1"; run-parts --arg="$1" --arg="/boot/initrd.img-$1" /etc/initramfs/post-update.d` + "\n"
	script(m, "etc/kernel/postinst.d/initramfs-tools", `source=/usr/lib/linux/$1.initrd; `+updateInitramfs)
	script(m, "etc/kernel/postinst.d/zz-update-grub", updateGRUB)
	script(m, "etc/kernel/postrm.d/zz-update-grub", updateGRUB)
	was := simboot.Baseline(simboot.GRUB)
	will := withKernel(simboot.GRUB, "6.99.9")
	m.Write("boot/efi/EFI/debian/shimx64.efi", "shim 15.8")
	m.Write("boot/efi/EFI/debian/grubx64.efi", "GRUB 2.12")
	m.Write("root/cmdline", "BOOT_IMAGE=/boot/vmlinuz-"+was.Kernel+" "+was.CommandLine+"\n")
	m.Write("root/next.cfg", string(filesOf(t, was).GRUBConfig))
	m.Sh("mkdir -p /boot/grub /etc/initramfs/post-update.d")
	old := kernelPackage(t, was)
	m.ShFor(updating, old.build(t, m))
	reboot(m, was)
	m.Sh("mount --bind cmdline /proc/cmdline")
	m.ShFor(updating, "apt-get install -y --no-install-recommends ./2.deb")
	m.Configure("")
	m.Sh("kleidi init --recovery-recipient " + recipient(t) + "; systemctl enable -q --now kleidi")

	// The new kernel is installed beside the former one, which is removed afterwards
	m.Write("root/next.cfg", string(filesOf(t, will).GRUBConfig)+"menuentry 'one more' {\n}\n")
	update(t, m, kernelPackage(t, will).build(t, m), "the new grub.cfg has other entries than the running one")
	m.Write("root/next.cfg", string(filesOf(t, will).GRUBConfig))
	update(t, m, "apt-get remove -y "+old.name+" 2>&1", prepared+"vmlinuz-6.99.9, as /"+grubConfig+" starts it")

	// A trigger rebuilds the initrd
	will.Initrd = "rebuilt"
	f := filesOf(t, will)
	m.ShFor(updating, pkg{name: "initramfs-tools", triggers: "interest-noawait update-initramfs\n",
		postinst: `[ "$1" = triggered ] || exit 0; set -- 6.99.9; source=/root/initrd; ` + updateInitramfs}.build(t, m))
	m.Write("root/initrd", string(f.Initrd))
	update(t, m, pkg{name: "firmware", triggers: "activate-noawait update-initramfs\n"}.build(t, m), prepared+"vmlinuz-6.99.9")
	reboot(m, will)
	opens(t, m)
}
