// Command init is /init of the test machines' initrd. It brings up what kleidi
// needs of a Linux machine, checks the disk with the programs against the digest
// that was measured with the initrd, and hands over to the driver on it.
package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
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
	for _, step := range []func() error{mount, modules, efivars, tools} {
		if err := step(); err != nil {
			return err
		}
	}
	return fmt.Errorf("exec %s: %w", wire.Driver, syscall.Exec(wire.Driver, []string{wire.Driver}, []string{"PATH=/usr/bin", "HOME=/"}))
}

func mount() error {
	for _, m := range []struct{ kind, at string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/run"}, {"tmpfs", "/tmp"},
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

// modules loads what lies in /modules, in the order of its names.
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

// tools unpacks the disk with the programs. It is read as a whole first, so that
// what is checked is what is run.
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
	return disk.Unpack(files, "/")
}
