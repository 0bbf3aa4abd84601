package measuredboot

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/disk"
	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
)

// systemPrograms are the programs of systemd's package that the guest runs.
var systemPrograms = []string{
	wire.Systemd, "/lib/systemd/systemd-journald", "/lib/systemd/systemd-pcrphase", "/lib/systemd/systemd-shutdown",
	"/bin/systemctl", "/bin/systemd-tmpfiles", "/bin/mount", "/bin/umount",
}

// systemUnits are the units of systemd's package in the guest: those up to
// multi-user.target, without any that needs D-Bus, udev or disks.
var systemUnits = []string{
	"basic.target", "sysinit.target", "multi-user.target", "local-fs.target", "local-fs-pre.target", "remote-fs.target",
	"remote-fs-pre.target", "remote-cryptsetup.target", "swap.target", "sockets.target", "timers.target", "paths.target", "slices.target", "network.target",
	"umount.target", "shutdown.target", "final.target", "emergency.target", "rescue.target",
	"systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket",
	"systemd-tmpfiles-setup.service", "systemd-pcrphase.service", "systemd-pcrphase-sysinit.service",
}

// wanted says which units a target starts.
var wanted = map[string][]string{
	"sysinit.target":    {"systemd-journald.service", "systemd-tmpfiles-setup.service", "systemd-pcrphase.service", "systemd-pcrphase-sysinit.service"},
	"sockets.target":    {"systemd-journald.socket", "systemd-journald-dev-log.socket"},
	"multi-user.target": {"kleidi.service", "driver.service"},
}

// systemText holds the small files. kleidi's own unit and tmpfiles.d come from deploy.
var systemText = map[string]string{
	"/etc/passwd":                        "root:x:0:0:root:/root:/bin/false\n",
	"/etc/group":                         "root:x:0:\n",
	"/etc/machine-id":                    "5d0a9e1c3b6f4a7f8e2d1c0b9a8f7e6d\n",
	"/etc/os-release":                    "ID=measuredboot\n",
	"/etc/hostname":                      "cp1\n",
	"/etc/systemd/system.conf":           "[Manager]\nDefaultTimeoutStartSec=15min\n",
	"/etc/fstab":                         "",
	"/root/.keep":                        "",
	"/home/.keep":                        "",
	"/var/tmp/.keep":                     "",
	"/etc/systemd/system/default.target": "[Unit]\nDescription=Up\nRequires=multi-user.target\nAfter=multi-user.target\nAllowIsolate=yes\n",
	"/etc/systemd/system/kleidi.service.d/log.conf": "[Service]\nStandardError=append:/run/serve.log\n",
	"/etc/systemd/system/driver.service": `[Unit]
Description=Does what the host of this test machine asks for, as an operator would once it is up
After=systemd-pcrphase.service kleidi.service
[Service]
ExecStart=` + wire.Driver + `
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
`,
}

// systemFiles returns a root file system with systemd and with kleidi's delivered unit.
func (p *parts) systemFiles() ([]disk.File, error) {
	var files []disk.File
	for name, text := range systemText {
		files = append(files, disk.File{Name: name, Mode: 0o644, Data: []byte(text)})
	}
	for to, from := range map[string]string{
		"/etc/systemd/system/kleidi.service": "../../deploy/kleidi.service",
		"/etc/tmpfiles.d/kleidi.conf":        "../../deploy/tmpfiles.d/kleidi.conf",
	} {
		b, err := os.ReadFile(from)
		if err != nil {
			return nil, err
		}
		files = append(files, disk.File{Name: to, Mode: 0o644, Data: b})
	}
	units, err := p.units()
	if err != nil {
		return nil, err
	}
	files = append(files, units...)
	programs := map[string][]byte{}
	for _, name := range systemPrograms {
		if err := p.addProgram(name, programs); err != nil {
			return nil, err
		}
	}
	for _, name := range []string{"libtss2-esys.so.0", "libtss2-rc.so.0", "libtss2-mu.so.0", "libtss2-tcti-device.so.0"} { // loaded by name
		if err := p.addLibrary(name, programs); err != nil {
			return nil, err
		}
	}
	for name, b := range programs {
		files = append(files, disk.File{Name: name, Mode: 0o755, Data: b})
	}
	slices.SortFunc(files, func(a, b disk.File) int { return strings.Compare(a.Name, b.Name) })
	return files, nil
}

func (p *parts) units() ([]disk.File, error) {
	const dir = "/lib/systemd/system/"
	var files []disk.File
	for _, name := range systemUnits {
		b, err := os.ReadFile(p.system + dir + name)
		if err != nil {
			return nil, err
		}
		files = append(files, disk.File{Name: dir + name, Mode: 0o644, Data: b})
	}
	for target, names := range wanted {
		text := "[Unit]\nWants=" + strings.Join(names, " ") + "\n"
		files = append(files, disk.File{Name: "/etc/systemd/system/" + target + ".d/wants.conf", Mode: 0o644, Data: []byte(text)})
	}
	return files, nil
}

// addProgram adds a program with all its libraries.
func (p *parts) addProgram(name string, files map[string][]byte) error {
	path := p.system + name
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	files[name] = b
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer f.Close()
	needs, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, s := range f.Progs {
		if s.Type == elf.PT_INTERP {
			interpreter := make([]byte, s.Filesz-1)
			if _, err := s.ReadAt(interpreter, 0); err != nil {
				return err
			}
			if files[string(interpreter)], err = os.ReadFile(p.system + "/lib/x86_64-linux-gnu/" + filepath.Base(string(interpreter))); err != nil {
				return err
			}
		}
	}
	for _, need := range needs {
		if err := p.addLibrary(need, files); err != nil {
			return err
		}
	}
	return nil
}

func (p *parts) addLibrary(name string, files map[string][]byte) error {
	for _, dir := range []string{"/lib/x86_64-linux-gnu/", "/usr/lib/x86_64-linux-gnu/", "/usr/lib/x86_64-linux-gnu/systemd/"} {
		if _, ok := files[dir+name]; ok {
			return nil
		}
		err := p.addProgram(dir+name, files)
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return fmt.Errorf("there is no library %s in %s", name, p.system)
}
