// Package hooks tests the hooks of this folder with a kleidi that only records its
// calls. e2e/docs runs the hooks with the real one.
package hooks

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// host is a root folder with the hooks in it, which holds their absolute paths.
type host struct {
	t    *testing.T
	root string
	env  []string
}

const (
	bootedLine = "BOOT_IMAGE=/boot/vmlinuz-1 root=/dev/vda1 ro quiet"
	booted     = "set timeout=0\nmenuentry 'Debian' {\n\tlinux\t/boot/vmlinuz-1 root=/dev/vda1 ro quiet\n\tinitrd\t/boot/initrd.img-1\n}\n"
)

var installed = map[string]string{
	"kleidi-next-boot":  "usr/local/sbin/kleidi-next-boot",
	"95-kleidi.install": "etc/kernel/install.d/95-kleidi.install",
	"zzz-kleidi":        "etc/initramfs/post-update.d/zzz-kleidi",
	"dpkg.cfg":          "etc/dpkg/dpkg.cfg.d/kleidi",
}

// The kleidi of these tests: reseal fails if a file of that name exists.
const fake = `#!/bin/sh
echo "$*" >>ROOT/calls
case $1 in
status) cat ROOT/status ;;
reseal)
	[ ! -e ROOT/crash ] || kill -9 $$
	[ ! -e ROOT/refuse ] || { echo 'error: reseal: PCR 8 of the next boot cannot be predicted' >&2; exit 1; }
	;;
esac
`

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, root: t.TempDir()}
	for name, path := range installed {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		h.write(path, h.relocate(string(b)))
	}
	h.write("bin/kleidi", strings.ReplaceAll(fake, "ROOT", h.root))
	h.write("bin/logger", "#!/bin/sh\necho \"$*\" >>"+h.root+"/logged\n")
	h.write("status", `{"state": "open"}`)
	h.env = append(os.Environ(), "PATH="+h.root+"/bin:"+os.Getenv("PATH"), "HOME="+h.root)
	return h
}

// relocate moves the absolute paths of the hooks to this host.
func (h *host) relocate(script string) string {
	for _, path := range []string{"/run/kleidi-hooks", "/sys/firmware", "/boot/", "/boot$path", "/efi/EFI", "/efi$path", "/proc/cmdline", "/etc/dpkg", "/etc/kernel", "/usr/local/sbin"} {
		for _, before := range []string{" ", "=", "<", ":", "\"", "-"} {
			script = strings.ReplaceAll(script, before+path, before+h.root+path)
		}
	}
	return script
}

func (h *host) write(path, content string) {
	h.t.Helper()
	path = filepath.Join(h.root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) remove(path string) {
	h.t.Helper()
	if err := os.RemoveAll(filepath.Join(h.root, path)); err != nil {
		h.t.Fatal(err)
	}
}

// read returns the content of a file, or "" if there is none.
func (h *host) read(path string) string {
	b, _ := os.ReadFile(filepath.Join(h.root, path))
	return string(b)
}

// reseals returns the calls of kleidi reseal since the last time.
func (h *host) reseals() []string {
	var calls []string
	for line := range strings.Lines(h.read("calls")) {
		if args, ok := strings.CutPrefix(strings.TrimSpace(line), "reseal "); ok {
			calls = append(calls, strings.ReplaceAll(args, h.root, ""))
		}
	}
	h.remove("calls")
	return calls
}

// run runs an installed hook, which must succeed, and returns its output.
func (h *host) run(env []string, name string, args ...string) string {
	h.t.Helper()
	cmd := exec.Command("dash", append([]string{filepath.Join(h.root, installed[name])}, args...)...)
	cmd.Env = append(h.env, env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		h.t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// grub makes a host that has booted with GRUB.
func grub(t *testing.T) *host {
	t.Helper()
	h := newHost(t)
	h.write("proc/cmdline", bootedLine+"\n")
	h.write("boot/grub/grub.cfg", booted)
	h.write("boot/vmlinuz-1", "kernel 1")
	h.write("boot/initrd.img-1", "initrd 1")
	h.write("boot/efi/EFI/debian/grubx64.efi", "grub 1")
	h.write("boot/efi/EFI/debian/shimx64.efi", "shim 1")
	h.run(nil, "kleidi-next-boot", "booted")
	return h
}

// update does the work of a kernel package and its triggers.
func (h *host) update() {
	h.t.Helper()
	h.write("boot/vmlinuz-2", "kernel 2")
	h.write("boot/initrd.img-2", "initrd 2")
	h.write("boot/grub/grub.cfg", strings.NewReplacer("vmlinuz-1", "vmlinuz-2", "initrd.img-1", "initrd.img-2").Replace(booted))
}

func (h *host) want(output, says string, reseals ...string) {
	h.t.Helper()
	got := h.reseals()
	if strings.Join(got, "\n") != strings.Join(reseals, "\n") {
		h.t.Errorf("kleidi reseal was called with %q, not %q; output:\n%s", got, reseals, output)
	}
	if says == "" && output != "" || !strings.Contains(output, says) {
		h.t.Errorf("the output should say %q:\n%s", says, output)
	}
}

const (
	toSecond = "--running-grub-config /run/kleidi-hooks/grub.cfg --next-grub-config /boot/grub/grub.cfg --next-kernel /boot/vmlinuz-2 --next-initrd /boot/initrd.img-2"
	toFirst  = "--running-grub-config /run/kleidi-hooks/grub.cfg --next-grub-config /boot/grub/grub.cfg --next-kernel /boot/vmlinuz-1 --next-initrd /boot/initrd.img-1"
	loud     = "THE NEXT BOOT IS NOT PREPARED"
)

// inDpkg is the environment of a package's script.
var inDpkg = []string{"DPKG_MAINTSCRIPT_PACKAGE=linux-image-amd64"}

func TestDpkgTakesTheFinalFiles(t *testing.T) {
	h := grub(t)
	h.want(h.run(nil, "kleidi-next-boot", "after-dpkg"), "")
	h.write("boot/vmlinuz-2", "kernel 2")
	h.want(h.run(inDpkg, "zzz-kleidi", "2", "/boot/vmlinuz-2"), "")
	h.update()
	h.want(h.run(inDpkg, "zzz-kleidi", "2", "/boot/initrd.img-2"), "")
	h.want(h.run(nil, "kleidi-next-boot", "after-dpkg"), "the next boot is prepared: vmlinuz-2", toSecond)
	h.want(h.run(nil, "kleidi-next-boot", "after-dpkg"), "")
	// the kernel's file is replaced under its name
	h.write("boot/vmlinuz-2", "kernel 2, security fix")
	h.want(h.run(nil, "kleidi-next-boot", "after-dpkg"), "the next boot is prepared", toSecond)
}

func TestInitrdByHand(t *testing.T) {
	h := grub(t)
	h.write("boot/initrd.img-1", "initrd 1, rebuilt")
	h.want(h.run(nil, "zzz-kleidi", "1", "/boot/initrd.img-1"), "the next boot is prepared: vmlinuz-1", toFirst)
}

func TestKernelOfItsOwnPartition(t *testing.T) {
	h := grub(t)
	h.remove("run")
	h.write("proc/cmdline", strings.Replace(bootedLine, "/boot/", "/", 1)+"\n")
	h.write("boot/grub/grub.cfg", strings.ReplaceAll(booted, "/boot/", "/"))
	h.run(nil, "kleidi-next-boot", "booted")
	h.want(h.run(nil, "kleidi-next-boot", "grub"), "the next boot is prepared", toFirst)
}

// TestEntryThatBooted: the entry that booted counts, not the first one.
func TestEntryThatBooted(t *testing.T) {
	h := grub(t)
	h.remove("run")
	other := strings.NewReplacer("vmlinuz-1", "vmlinuz-0", "initrd.img-1", "initrd.img-0").Replace(booted)
	h.write("boot/grub/grub.cfg", other+booted)
	h.run(nil, "kleidi-next-boot", "booted")
	h.update()
	h.write("boot/grub/grub.cfg", other+h.read("boot/grub/grub.cfg"))
	h.want(h.run(nil, "kleidi-next-boot", "grub"), "the next boot is prepared", toSecond)
}

func TestRefusalsAreLoudAndBreakNothing(t *testing.T) {
	for name, c := range map[string]struct {
		make    func(*host)
		says    string
		reseals []string
	}{
		"kleidi crashes":            {func(h *host) { h.write("crash", "") }, "kleidi reseal ended without a word, with code 137", []string{toSecond}},
		"kleidi refuses":            {func(h *host) { h.write("refuse", "") }, "PCR 8 of the next boot cannot be predicted", []string{toSecond}},
		"boot loader replaced":      {func(h *host) { h.write("boot/efi/EFI/debian/grubx64.efi", "grub 2") }, "the boot loader has changed, and can not be predicted", nil},
		"boot loader removed":       {func(h *host) { h.remove("boot/efi/EFI/debian/shimx64.efi") }, "shimx64.efi", nil},
		"booted grub.cfg not known": {func(h *host) { h.remove("run") }, "the grub.cfg that booted is not known", nil},
		"kernel not in grub.cfg":    {func(h *host) { h.write("proc/cmdline", "BOOT_IMAGE=/elsewhere/vmlinuz-1\n") }, "does not show which kernel it starts instead of /elsewhere/vmlinuz-1", nil},
		"kernel not there":          {func(h *host) { h.remove("boot/vmlinuz-2") }, "does not show which kernel it starts", nil},
	} {
		t.Run(name, func(t *testing.T) {
			h := grub(t)
			h.update()
			c.make(h)
			out := h.run(nil, "kleidi-next-boot", "after-dpkg")
			h.want(out, c.says, c.reseals...)
			for _, part := range []string{loud, "kleidi suspend --boots 1", "kleidi recover", "may be locked"} {
				if !strings.Contains(out, part) {
					t.Errorf("it does not say %q:\n%s", part, out)
				}
			}
			if logged := h.read("logged"); !strings.Contains(logged, "-p daemon.err") || !strings.Contains(logged, "not prepared") {
				t.Errorf("logged: %q", logged)
			}
		})
	}
}

func TestSuspendedIsNotLoud(t *testing.T) {
	h := grub(t)
	h.update()
	h.write("refuse", "")
	h.write("status", `{"suspension": {"binding": "…", "bootsLeft": 2}}`)
	if out := h.run(nil, "kleidi-next-boot", "grub"); strings.Contains(out, loud) || !strings.Contains(out, "This node is suspended") {
		t.Error(out)
	}
	h.write("status", `{"suspension": {"binding": "…", "bootsLeft": 0}}`)
	if out := h.run(nil, "kleidi-next-boot", "grub"); !strings.Contains(out, loud) {
		t.Error(out)
	}
}

func TestQuietWithoutAKeyring(t *testing.T) {
	h := grub(t)
	h.update()
	h.write("status", `{"problem": {"cause": "keyring-missing"}}`)
	h.want(h.run(nil, "kleidi-next-boot", "after-dpkg"), "")
	h.want(h.run(nil, "zzz-kleidi", "2"), "")
	h.want(h.run(ukiEnv(h), "95-kleidi.install", "add", "2", "", "/boot/vmlinuz-2"), "")
	h.remove("bin/kleidi")
	h.write("boot/vmlinuz-2", "another")
	h.want(h.run(nil, "kleidi-next-boot", "after-dpkg"), "")
	h.remove("usr/local/sbin/kleidi-next-boot")
	h.want(h.run(nil, "zzz-kleidi", "2"), "")
	h.want(h.run(nil, "95-kleidi.install", "add", "2", ""), "")
}

func ukiEnv(h *host) []string {
	return []string{"KERNEL_INSTALL_LAYOUT=uki", "KERNEL_INSTALL_BOOT_ROOT=" + h.root + "/efi",
		"KERNEL_INSTALL_ENTRY_TOKEN=token", "KERNEL_INSTALL_STAGING_AREA=" + h.root + "/staging"}
}

func TestKernelInstall(t *testing.T) {
	const esp = "efi/EFI/Linux/token-2"
	for name, c := range map[string]struct {
		files   []string
		image   string
		want    string
		without bool
	}{
		"on the system partition":     {files: []string{esp + ".efi", "staging/uki.efi"}, want: "/" + esp + ".efi"},
		"with boot counting":          {files: []string{"etc/kernel/tries", esp + "+3.efi", esp + ".efi"}, want: "/" + esp + "+3.efi"},
		"staged":                      {files: []string{"staging/uki.efi"}, want: "/staging/uki.efi"},
		"given":                       {files: []string{"lib/uki.efi"}, image: "lib/uki.efi", want: "/lib/uki.efi"},
		"a kernel that is no image":   {files: []string{"lib/vmlinuz"}, image: "lib/vmlinuz", without: true},
		"of another kernel's version": {files: []string{"efi/EFI/Linux/token-1.efi"}, without: true},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.write("efi/EFI/systemd/systemd-bootx64.efi", "systemd-boot 1")
			h.run(nil, "kleidi-next-boot", "booted")
			for _, f := range c.files {
				h.write(f, "3\n")
			}
			out := h.run(ukiEnv(h), "95-kleidi.install", "add", "2", h.root+"/efi/token/2", h.root+"/"+c.image)
			if c.without {
				h.want(out, loud)
				return
			}
			h.want(out, "the next boot is prepared", "--next-uki "+c.want)
			h.write("efi/EFI/systemd/systemd-bootx64.efi", "systemd-boot 2")
			h.want(h.run(ukiEnv(h), "95-kleidi.install", "add", "2", "", h.root+"/"+c.image), "systemd-bootx64.efi")
		})
	}
}

func TestKernelInstallOtherwise(t *testing.T) {
	h := newHost(t)
	h.want(h.run(ukiEnv(h), "95-kleidi.install", "remove", "2"), "")
	h.want(h.run([]string{"KERNEL_INSTALL_LAYOUT=bls"}, "95-kleidi.install", "add", "2", "", "/boot/vmlinuz-2"), "kernel 2, installed with the layout bls")
	h.write("boot/grub/grub.cfg", booted)
	h.want(h.run([]string{"KERNEL_INSTALL_LAYOUT=other"}, "95-kleidi.install", "add", "2"), "")
}

// TestRunningImage: kleidi gets the running image if the image still exists. If that
// does not help, the hook leaves the image out.
func TestRunningImage(t *testing.T) {
	const variable = "sys/firmware/efi/efivars/StubImageIdentifier-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
	h := newHost(t)
	h.run(nil, "kleidi-next-boot", "booted")
	image := "\\EFI\\Linux\\token-1.efi\x00"
	h.write(variable, "\x06\x00\x00\x00"+strings.Join(strings.Split(image, ""), "\x00")+"\x00")
	h.write("efi/EFI/Linux/token-2.efi", "image 2")
	next := h.root + "/efi/EFI/Linux/token-2.efi"
	alone := "--next-uki /efi/EFI/Linux/token-2.efi"
	h.want(h.run(nil, "kleidi-next-boot", "uki", next), "the next boot is prepared", alone)
	h.write("efi/EFI/Linux/token-1.efi", "image 1")
	with := alone + " --running-uki /efi/EFI/Linux/token-1.efi"
	h.want(h.run(nil, "kleidi-next-boot", "uki", next), "the next boot is prepared", with)
	h.write("refuse", "")
	h.want(h.run(nil, "kleidi-next-boot", "uki", next), loud, with, alone)
}

// TestImageWithoutLoader: an image that the firmware starts directly is not a changed
// boot loader.
func TestImageWithoutLoader(t *testing.T) {
	h := newHost(t)
	h.write("efi/EFI/BOOT/BOOTX64.EFI", "image 1")
	h.run(nil, "kleidi-next-boot", "booted")
	h.write("efi/EFI/BOOT/BOOTX64.EFI", "image 2")
	h.want(h.run(nil, "kleidi-next-boot", "uki", h.root+"/efi/EFI/BOOT/BOOTX64.EFI"), "the next boot is prepared", "--next-uki /efi/EFI/BOOT/BOOTX64.EFI")
}

// TestDpkg installs a package with the real dpkg: its script installs an image
// twice, and dpkg's last step takes the final one.
func TestDpkg(t *testing.T) {
	h := newHost(t)
	h.write(".dpkg.cfg", h.read(installed["dpkg.cfg"]))
	for _, dir := range []string{"updates", "info", "triggers"} {
		h.write("db/"+dir+"/.keep", "")
	}
	h.write("db/status", "")
	h.write("package/DEBIAN/control", "Package: linux-image\nVersion: 2\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: test\n")
	h.write("package/DEBIAN/postinst", "#!/bin/sh\nset -e\nmkdir -p "+h.root+"/efi/EFI/Linux\nfor content in early final; do\n\techo $content >"+h.root+"/efi/EFI/Linux/token-2.efi\n\t"+
		strings.Join(ukiEnv(h), " ")+" "+h.root+"/"+installed["95-kleidi.install"]+" add 2 none none\ndone\n! grep reseal "+h.root+"/calls\n")
	for _, args := range [][]string{
		{"dpkg-deb", "--build", h.root + "/package", h.root + "/package.deb"},
		{"dpkg", "--admindir", h.root + "/db", "--force-script-chrootless", "--force-not-root", "--instdir", h.root, "--log", h.root + "/log", "--install", h.root + "/package.deb"},
	} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = h.env
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
		t.Logf("%s", out)
	}
	h.want("", "", "--next-uki /efi/EFI/Linux/token-2.efi")
}

// TestOneMessage: a boot loader that is replaced together with an image is reported once.
func TestOneMessage(t *testing.T) {
	h := newHost(t)
	h.write("efi/EFI/systemd/systemd-bootx64.efi", "systemd-boot 1")
	h.run(nil, "kleidi-next-boot", "booted")
	h.write("efi/EFI/Linux/token-2.efi", "image 2")
	h.want(h.run(append(ukiEnv(h), inDpkg...), "95-kleidi.install", "add", "2", "", "/boot/vmlinuz-2"), "")
	h.write("efi/EFI/systemd/systemd-bootx64.efi", "systemd-boot 2")
	if out := h.run(nil, "kleidi-next-boot", "after-dpkg"); strings.Count(out, loud) != 1 {
		t.Error(out)
	}
}
