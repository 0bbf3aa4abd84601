package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// PrepareDir creates dir with mode 0700 if it is missing, and flushes its parent,
// which must exist. PrepareDir fails if dir exists and is a symbolic link or not a
// folder, is writable by its group or by others, or belongs to neither this user
// nor root.
func PrepareDir(dir string) error {
	dir = filepath.Clean(dir)
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return checkDir(dir)
	}
	if err != nil {
		return fmt.Errorf("make the state folder: %w", err)
	}
	return syncDir(filepath.Dir(dir))
}

func checkDir(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		return fmt.Errorf("folder %s is a symbolic link; name the folder that it points to", dir)
	case !info.IsDir():
		return fmt.Errorf("%s is not a folder; name another", dir)
	}
	return checkAccess(dir, info)
}

// checkAccess fails if another user could have written to the file or folder.
func checkAccess(path string, info fs.FileInfo) error {
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return fmt.Errorf("%s may be written by others (mode %04o); find out who wrote to it, then run chmod go-w %s", path, perm, path)
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s: its owner is unknown", path)
	}
	if stat.Uid != 0 && int(stat.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to UID %d; find out who made it, then run chown %d %s", path, stat.Uid, os.Geteuid(), path)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("flush folder %s: %w", dir, err)
	}
	return nil
}
