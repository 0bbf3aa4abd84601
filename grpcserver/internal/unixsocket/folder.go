package unixsocket

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/internal/ownership"
	"github.com/beezy-dev/kleidi/seal"
)

// checkFolder verifies that dir
//  1. exists, and is a folder rather than a symbolic link;
//  2. can be written only by root and this process's user, as can every folder on the way to
//     it, so that nobody else can replace our socket.
//
// A sticky folder such as /tmp is not enough: another user may be the first to listen
// there.
func checkFolder(dir string) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("folder %s does not exist; make it: install -d -m 0755 -o root %s (with systemd: systemd-tmpfiles --create)%w", dir, seal.Quote(dir), silent{err})
		}
		return fmt.Errorf("folder %s: %w", dir, err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		return fmt.Errorf("folder %s is a symbolic link; give the folder that it points to", dir)
	case unix.S_IFDIR:
		return ownership.CheckFolder(dir)
	}
	return fmt.Errorf("%s is not a folder; give a path in one", dir)
}

// silent keeps an error for errors.Is if the message already contains its text.
type silent struct{ error }

// Error implements error.
func (silent) Error() string { return "" }

// Unwrap returns the error that is not shown.
func (s silent) Unwrap() error { return s.error }

// checkWritable verifies that this process can make a socket in dir.
func checkWritable(dir string) error {
	if err := unix.Faccessat(unix.AT_FDCWD, dir, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		return fmt.Errorf("folder %s can't be written by UID %d: %w; chown it, or let its owner run kleidi", dir, os.Geteuid(), err)
	}
	return nil
}
