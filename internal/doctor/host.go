package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
)

func folders(n *Node) (all []diagnosis.Finding) {
	for _, dir := range []string{filepath.Dir(n.Config.KMS.Socket), n.Config.State.Dir} {
		if !n.exists(dir) {
			all = append(all, diagnosis.Found("folders/missing", "systemd-tmpfiles --create kleidi.conf", "folder %s does not exist", dir)...)
		}
	}
	return all
}

// fileModes checks the files that hold a secret, and the files that decide something.
func fileModes(n *Node) (all []diagnosis.Finding) {
	c := n.Config
	for _, f := range []struct{ key, path string }{
		{"tpm.ownerAuthFile", c.TPM.OwnerAuthFile}, {"pkcs11.pinFile", c.PKCS11.PINFile}, {"vault.auth.tokenFile", c.Vault.Auth.TokenFile},
		{"vault.auth.secretIDFile", c.Vault.Auth.SecretIDFile}, {"vault.auth.jwtFile", c.Vault.Auth.JWTFile}, {"vault.auth.keyFile", c.Vault.Auth.KeyFile},
	} {
		if f.path == "" {
			continue
		}
		st, err := os.Stat(n.path(f.path))
		switch {
		case os.IsNotExist(err):
			all = append(all, diagnosis.Found("files/missing", "ls -l "+f.path+"   # put it there, or correct "+f.key, "there is no %s, which %s names", f.path, f.key)...)
		case err != nil:
			all = append(all, diagnosis.NotChecked("%s: %v", f.key, err)...)
		case st.Mode().Perm()&0o077 != 0:
			all = append(all, diagnosis.Found("files/readable", "chmod 0600 "+f.path, "%s, which %s names, has mode %04o", f.path, f.key, st.Mode().Perm())...)
		}
	}
	for _, path := range []string{c.State.Dir, c.Keyring()} {
		if st, err := os.Stat(n.path(path)); err == nil && st.Mode().Perm()&0o077 != 0 {
			all = append(all, diagnosis.Found("files/readable", fmt.Sprintf("chmod %04o %s", st.Mode().Perm()&^0o077, path), "%s has mode %04o", path, st.Mode().Perm())...)
		}
	}
	return append(all, n.writable(c.TPM.BootPolicy)...)
}

// writable finds a file that others can write. kleidi refuses such a configuration, so the
// other checks never meet one.
func (n *Node) writable(path string) []diagnosis.Finding {
	if st, err := os.Stat(n.path(path)); path != "" && err == nil && st.Mode().Perm()&0o022 != 0 {
		return diagnosis.Found("files/writable", "chmod go-w "+path, "%s has mode %04o", path, st.Mode().Perm())
	}
	return nil
}

// Bounds of the state folder's file system, below which the disk counts as full. A
// keyring has less than a megabyte, and is written beside the former one.
const (
	leastFree   = 64 << 20
	leastInodes = 0.01
)

func disk(n *Node) []diagnosis.Finding {
	d := n.Disk.Value
	switch {
	case d == nil && n.Disk.Why != "":
		return diagnosis.NotChecked("%s", n.Disk.Why)
	case d == nil:
		return nil
	case d.Free < leastFree:
		return diagnosis.Found("disk/full", "du -xh "+n.Config.State.Dir+"   # and the rest of its file system", "the file system of %s has only %d MB left", n.Config.State.Dir, d.Free>>20)
	case d.Inodes < leastInodes:
		return diagnosis.Found("disk/full", "df -i "+n.Config.State.Dir, "the file system of %s has nearly no inodes left", n.Config.State.Dir)
	}
	return nil
}

// unitFolders are where systemd looks for units, the first one first.
var unitFolders = []string{"/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

// weakening are the values of a unit's settings that disable a part of the sandbox.
var weakening = map[string][]string{
	"NoNewPrivileges": {"no", "false", "0"}, "ProtectSystem": {"no", "false", "0"}, "ProtectHome": {"no", "false", "0"}, "PrivateTmp": {"no", "false", "0"},
	"ProtectKernelModules": {"no", "false", "0"}, "ProtectKernelTunables": {"no", "false", "0"}, "ProtectKernelLogs": {"no", "false", "0"},
	"MemoryDenyWriteExecute": {"no", "false", "0"}, "RestrictNamespaces": {"no", "false", "0"}, "ProtectProc": {"default"}, "DevicePolicy": {"auto"},
	"SystemCallFilter": {""}, "RestrictAddressFamilies": {""}, "LimitCORE": {"infinity"}, "IPAddressAllow": {"any"}, "MemorySwapMax": {"infinity"},
}

// unit checks the files of kleidi.service, if it exists.
func unit(n *Node) (all []diagnosis.Finding) {
	const name = "kleidi.service"
	at := slices.IndexFunc(unitFolders, func(f string) bool { return n.exists(filepath.Join(f, name)) })
	if at < 0 {
		return diagnosis.NotChecked("%s does not exist: something else starts kleidi serve", name)
	}
	for _, folder := range unitFolders {
		names, _ := filepath.Glob(n.path(filepath.Join(folder, name+".d", "*.conf")))
		for _, file := range names {
			shown := strings.TrimPrefix(file, n.Root)
			b, err := n.read(shown)
			if err != nil {
				all = append(all, diagnosis.NotChecked("%s: %v", shown, err)...)
			}
			if line := weakened(string(b)); line != "" {
				all = append(all, diagnosis.Found("unit/weakened", "systemctl revert kleidi   # or remove the line from "+shown, "%s switches a part of the sandbox off: %s", shown, line)...)
			}
		}
	}
	if at == 0 && slices.ContainsFunc(unitFolders[2:], func(f string) bool { return n.exists(filepath.Join(f, name)) }) {
		all = append(all, diagnosis.Found("unit/overridden", "systemctl revert kleidi", "%s replaces the package's unit", filepath.Join(unitFolders[0], name))...)
	}
	if links, _ := filepath.Glob(n.path("/etc/systemd/system/*.wants/" + name)); len(links) == 0 {
		all = append(all, diagnosis.Found("unit/not-enabled", "systemctl enable kleidi", "%s is not enabled", name)...)
	}
	return all
}

// weakened returns the first line of a drop-in that disables a part of the sandbox.
func weakened(text string) string {
	for line := range strings.Lines(text) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if values, known := weakening[strings.TrimSpace(key)]; ok && known && slices.Contains(values, strings.ToLower(strings.TrimSpace(value))) {
			return strings.TrimSpace(line)
		}
	}
	return ""
}

// hookFiles are the hooks that call the script. Each distribution has one of them.
var hookFiles = []string{"/etc/kernel/postinst.d/zzz-kleidi", "/etc/kernel/install.d/95-kleidi.install", "/usr/lib/kernel/install.d/95-kleidi.install", "/lib/kernel/install.d/95-kleidi.install"}

// calls matches the line with which dpkg calls the script.
var calls = regexp.MustCompile(`(?m)^\s*post-invoke\s*=.*kleidi-next-boot\s+after-dpkg`)

func hooks(n *Node) (all []diagnosis.Finding) {
	if !n.usesTPM() {
		return nil
	}
	// dpkg takes a missing hook for removed by the administrator, and brings it back only when told
	packages := "dpkg --force-confmiss -i ./" + n.Package + "   # or rpm --reinstall; or copy deploy/hooks, see docs/updates.md"
	scripts := []string{"/usr/sbin/kleidi-next-boot", "/usr/local/sbin/kleidi-next-boot"}
	if !slices.ContainsFunc(scripts, n.exists) {
		return diagnosis.Found("hooks/missing", packages, "no hook for kernel updates is installed")
	}
	for _, file := range slices.Concat(scripts, hookFiles, []string{"/etc/initramfs/post-update.d/zzz-kleidi"}) {
		if st, err := os.Stat(n.path(file)); err == nil && st.Mode()&0o111 == 0 {
			all = append(all, diagnosis.Found("hooks/not-executable", "chmod 0755 "+file, "%s can't be run, with mode %04o", file, st.Mode().Perm())...)
		}
	}
	if !slices.ContainsFunc(hookFiles, n.exists) {
		all = append(all, diagnosis.Found("hooks/not-called", packages, "none of %s is there", strings.Join(hookFiles[:3], ", "))...)
	}
	// Debian writes kernel, initrd and grub.cfg one after another, so dpkg's last step prepares the boot
	const dpkg = "/etc/dpkg/dpkg.cfg.d/kleidi"
	if b, err := n.read(dpkg); n.exists("/etc/debian_version") && (os.IsNotExist(err) || err == nil && !calls.Match(b)) {
		all = append(all, diagnosis.Found("hooks/not-called", packages, "dpkg does not call the hook after an upgrade: %s is missing, or does not name it", dpkg)...)
	}
	return all
}

// maxRotation is how long a rotation may take.
const maxRotation = 24 * time.Hour

func leftovers(n *Node) (all []diagnosis.Finding) {
	for _, k := range n.Status.Keys {
		if k.Role == "staged" && n.Now.Sub(k.Created) > maxRotation {
			all = append(all, diagnosis.Found("leftovers/rotation", "kleidi rotate --continue   # or kleidi rotate --abort", "the KEK %s was staged at %s, and is not current yet", k.KeyID, k.Created.Format(time.RFC3339))...)
		}
	}
	left, _ := filepath.Glob(n.path(filepath.Join(n.Config.State.Dir, ".*.tmp-*")))
	for _, path := range left {
		if st, err := os.Stat(path); err == nil && n.Now.Sub(st.ModTime()) > time.Hour {
			shown := strings.TrimPrefix(path, n.Root)
			all = append(all, diagnosis.Found("leftovers/temporary", "rm "+shown, "%s was left behind at %s", shown, st.ModTime().UTC().Format(time.RFC3339))...)
		}
	}
	return all
}
