// Package powerloss gives tests a disk whose power can be cut: data that a program
// wrote without a flush is then lost, as after a real power failure.
//
// The disk is an ext4 file system in an image file behind a loop device. The image
// holds everything that the file system has sent to its device, and nothing that is
// still in memory. So a copy of the image is the disk at the moment of a power failure,
// and mounting the copy is a restart.
//
// A test that fails here is right: data that no flush demanded was lost. A test that
// passes may owe it to the kernel, which flushes without a request after some seconds.
// So tests must be quick, and cut the power right after the tested step.
package powerloss

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// size of the disk in bytes; mkfs.ext4 makes no journal on a much smaller one.
const size = 16 << 20

// options keep ext4 from flushing without a request: by default it commits every five
// seconds, and writes a file's data before a rename replaces another file.
const options = "commit=300,noauto_da_alloc"

// Disk is a mounted disk.
type Disk struct {
	t     testing.TB
	dir   string
	image string
}

// New mounts an empty disk on the folder dir, until the test ends. It needs root.
func New(t testing.TB, dir string) *Disk {
	t.Helper()
	d := &Disk{t: t, dir: dir, image: filepath.Join(t.TempDir(), "disk")}
	err := os.WriteFile(d.image, nil, 0o600)
	if err == nil {
		err = os.Truncate(d.image, size)
	}
	if err != nil {
		t.Fatal(err)
	}
	mkfs := exec.Command("mkfs.ext4", "-q", d.image)
	mkfs.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if out, err := mkfs.CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	if err := mount(d.image, dir); err != nil {
		t.Fatalf("mount a disk of its own (run the tests as root): %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(d.dir, unix.MNT_DETACH) })
	// A new ext4 file system has this folder, which is empty
	if err := errors.Join(os.Remove(filepath.Join(dir, "lost+found")), os.Chmod(dir, 0o700)); err != nil {
		t.Fatal(err)
	}
	d.Flush() // puts the file system itself on the disk
	return d
}

// Cut cuts the power and starts again. The disk then holds the flushed data. No file on
// it may be open.
func (d *Disk) Cut() {
	d.t.Helper()
	survived, err := os.ReadFile(d.image)
	if err != nil {
		d.t.Fatal(err)
	}
	if err := Unmount(d.dir); err != nil {
		d.t.Fatalf("unmount %s: %v", d.dir, err)
	}
	if err := os.WriteFile(d.image, survived, 0o600); err != nil {
		d.t.Fatal(err)
	}
	if err := mount(d.image, d.dir); err != nil {
		d.t.Fatalf("mount the disk again: %v", err)
	}
}

// Unmount waits for other tests' children, which hold this process's open files from their
// fork to their exec.
func Unmount(dir string) error {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if err := unix.Unmount(dir, 0); !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
}

// Flush writes the whole file system to the disk.
func (d *Disk) Flush() {
	d.t.Helper()
	f, err := os.Open(d.dir)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		d.t.Fatalf("syncfs %s: %v", d.dir, err)
	}
}

// mount mounts the ext4 file system in image on dir.
func mount(image, dir string) error {
	loop, err := attach(image)
	if err != nil {
		return err
	}
	defer loop.Close() // the mount keeps the device, and frees it at its end
	if err := unix.Mount(loop.Name(), dir, "ext4", 0, options); err != nil {
		return fmt.Errorf("mount %s: %w", loop.Name(), err)
	}
	return nil
}

// attach puts image behind a free loop device.
func attach(image string) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	backing, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer backing.Close()
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("LOOP_CTL_GET_FREE: %w", err)
		}
		loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		config := unix.LoopConfig{Fd: uint32(backing.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &config)
		if err == nil {
			return loop, nil
		}
		loop.Close()
		if !errors.Is(err, unix.EBUSY) { // another process took it first
			return nil, fmt.Errorf("LOOP_CONFIGURE: %w", err)
		}
	}
}
