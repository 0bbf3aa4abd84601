package unixsocket

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// checkFolder verifies, in this order, that dir
//  1. exists, and is a folder rather than a symbolic link;
//  2. belongs to root or to this process's user;
//  3. can't be written by its group or by everybody, unless it is sticky, so that
//     nobody else can put a socket of his own in the place of ours;
//  4. lies below no folder that everybody may write and that is not sticky;
//  5. can be written by this process.
func checkFolder(dir string) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("folder %s does not exist; make it: install -d -m 0755 -o root %s (with systemd: systemd-tmpfiles --create)", dir, dir)
		}
		return fmt.Errorf("folder %s: %w", dir, err)
	}
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		return fmt.Errorf("folder %s is a symbolic link; give the folder that it points to", dir)
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is no folder; give a path in one", dir)
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return fmt.Errorf("folder %s belongs to UID %d, who could replace the socket; chown it to root", dir, st.Uid)
	case st.Mode&unix.S_ISVTX == 0 && st.Mode&0o022 != 0:
		return fmt.Errorf("folder %s has mode %04o, so others could replace the socket; chmod go-w %s", dir, st.Mode&0o7777, dir)
	}
	if err := checkAncestors(dir); err != nil {
		return err
	}
	if err := unix.Faccessat(unix.AT_FDCWD, dir, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		return fmt.Errorf("folder %s can't be written by UID %d: %w; chown it, or run kleidi as its owner", dir, os.Geteuid(), err)
	}
	return nil
}

func checkAncestors(dir string) error {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	for dir != "/" {
		dir = filepath.Dir(dir)
		var st unix.Stat_t
		if err := unix.Lstat(dir, &st); err != nil {
			return fmt.Errorf("folder %s: %w", dir, err)
		}
		if st.Mode&unix.S_ISVTX == 0 && st.Mode&0o002 != 0 {
			return fmt.Errorf("folder %s has mode %04o, so anybody could replace what is below it; chmod o-w %s", dir, st.Mode&0o7777, dir)
		}
	}
	return nil
}
