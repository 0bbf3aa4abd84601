// Command init is /init of the test machines' initrd. It prepares the machine for
// kleidi, checks the disk with the programs against the digest that was measured with
// the initrd, and hands over to the driver on that disk.
package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/disk"
	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
)

func main() {
	fmt.Println(wire.Seen)
	err := start()
	// PID 1 must not end: the kernel would panic
	fmt.Println("GUEST: init failed:", err)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func start() error {
	for _, step := range []func() error{mount, extras, modules, efivars, tools} {
		if err := step(); err != nil {
			return err
		}
	}
	for _, serial := range []string{wire.State, wire.Request} {
		if err := unpackDisk(serial); err != nil {
			return fmt.Errorf("disk %s: %w", serial, err)
		}
	}
	program := wire.Driver
	if _, err := os.Stat(root + wire.Systemd); err == nil {
		program = wire.Systemd
		if err := leaveInitrd(); err != nil {
			return err
		}
	}
	if err := switchRoot(); err != nil {
		return err
	}
	return fmt.Errorf("exec %s: %w", program, syscall.Exec(program, []string{program}, []string{"PATH=/usr/bin:/bin", "HOME=/"}))
}

// root is the folder for the file system that the initrd hands over to.
const root = "/sysroot"

// leaveInitrd lets systemd make the measurements that it makes in its own initrd.
func leaveInitrd() error {
	for _, m := range moved {
		if err := os.MkdirAll(root+m, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m, root+m, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("bind %s: %w", m, err)
		}
	}
	for _, phase := range []string{"enter-initrd", "leave-initrd"} {
		cmd := exec.Command("/lib/systemd/systemd-pcrphase", phase)
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("systemd-pcrphase %s: %w: %s", phase, err, out)
		}
	}
	for _, m := range moved {
		if err := unix.Unmount(root+m, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", m, err)
		}
	}
	return nil
}

// moved are the file systems that the next init finds mounted.
var moved = []string{"/dev", "/proc", "/sys", "/run"}

// switchRoot makes root the root folder, as switch_root(8) does.
func switchRoot() error {
	for _, m := range moved {
		if err := os.MkdirAll(root+m, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m, root+m, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", m, err)
		}
	}
	for _, step := range []func() error{
		func() error { return os.MkdirAll(root+"/tmp", 0o1777) },
		func() error { return os.Chdir(root) },
		func() error { return unix.Mount(".", "/", "", unix.MS_MOVE, "") },
		func() error { return unix.Chroot(".") },
		func() error { return os.Chdir("/") },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("switch to %s: %w", root, err)
		}
	}
	return nil
}

func mount() error {
	for _, m := range []struct{ kind, at string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/run"}, {"tmpfs", root},
		{"securityfs", "/sys/kernel/security"},
	} {
		if err := mountAt(m.kind, m.at); err != nil {
			return err
		}
	}
	return nil
}

func mountAt(kind, at string) error {
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(kind, at, kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s: %w", at, err)
	}
	return nil
}

// extras keeps the files that systemd's stub hands to the initrd, in the folder that
// systemd uses (tmpfiles.d/20-systemd-stub.conf).
func extras() error {
	files, err := filepath.Glob("/.extra/*")
	if err != nil || len(files) == 0 {
		return err
	}
	if err := os.MkdirAll("/run/systemd", 0o755); err != nil {
		return err
	}
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil { // not a folder
			if err := os.WriteFile("/run/systemd/"+filepath.Base(file), b, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// modules loads the files in /modules, in the order of their names.
func modules() error {
	files, err := filepath.Glob("/modules/*")
	if err != nil {
		return err
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if err := unix.InitModule(b, ""); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load %s: %w", file, err)
		}
	}
	return nil
}

func efivars() error { return mountAt("efivarfs", "/sys/firmware/efi/efivars") }

// tools unpacks the disk with the programs. It first reads the whole disk, so that the
// checked bytes are the bytes that run.
func tools() error {
	said, err := os.ReadFile(wire.ToolsDigest)
	if err != nil {
		return err
	}
	var want string
	var size int64
	if _, err := fmt.Sscan(string(said), &want, &size); err != nil {
		return fmt.Errorf("%s: %w", wire.ToolsDigest, err)
	}
	f, err := disk.Open(wire.Tools, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	archive := make([]byte, size)
	if _, err := io.ReadFull(f, archive); err != nil {
		return err
	}
	if got := fmt.Sprintf("%x", sha256.Sum256(archive)); got != want {
		return fmt.Errorf("the disk with the programs has digest %s, not %s", got, want)
	}
	files, err := disk.Read(bytes.NewReader(archive))
	if err != nil {
		return err
	}
	return disk.Unpack(files, root)
}

// unpackDisk unpacks a disk that nothing authenticates, such as the disk with kleidi's
// state folder. The request disk's steps run as root on a running machine.
func unpackDisk(serial string) error {
	f, err := disk.Open(serial, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	files, err := disk.Read(f)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(root+wire.StateDir), 0o755); err != nil {
		return err
	}
	return disk.Unpack(files, root)
}
