package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// PrepareDir makes dir, 0700, if it is missing; its parent must exist, and is
// flushed. An existing dir is refused if it is a symbolic link or no folder, if
// its group or others may write to it, or if it belongs to neither this user nor
// root.
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
		return fmt.Errorf("%s is no folder; name another", dir)
	}
	return checkAccess(dir, info)
}

// checkAccess refuses what somebody else could have written.
func checkAccess(path string, info fs.FileInfo) error {
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return fmt.Errorf("%s may be written by others (mode %04o); see who did, then run chmod go-w %s", path, perm, path)
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s: no owner known", path)
	}
	if stat.Uid != 0 && int(stat.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to UID %d; see who made it, then run chown %d %s", path, stat.Uid, os.Geteuid(), path)
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
