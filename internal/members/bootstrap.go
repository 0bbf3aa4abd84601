package members

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/grpcserver/join"
)

// bootstrapDir returns the folder of the bootstrap files, beside the admin socket:
// /run/kleidi/bootstrap.
func bootstrapDir(socket string) string { return filepath.Join(filepath.Dir(socket), "bootstrap") }

// writeFiles writes the bootstrap files to memory only, readable only by root. It comes
// before the keyring is saved, so a join that breaks off here can be run again.
func writeFiles(dir string, all []join.File) (paths []string, err error) {
	if len(all) == 0 {
		return nil, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("bootstrap files: %w", err)
	}
	if err := inMemory(dir); err != nil {
		return nil, fmt.Errorf("bootstrap files: %w", err)
	}
	for _, f := range all {
		path := filepath.Join(dir, f.Name)
		if err := writePrivate(path, f.Content); err != nil {
			return nil, fmt.Errorf("bootstrap files: %w", err)
		}
		paths = append(paths, path)
	}
	return paths, nil
}

// inMemory refuses a folder on a disk, and a folder that others can reach.
func inMemory(dir string) error {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return err
	}
	if s.Type != unix.TMPFS_MAGIC && s.Type != unix.RAMFS_MAGIC {
		return fmt.Errorf("%s is on a disk, which would keep them; set admin.socket to a path below /run, which is a tmpfs", dir)
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() || info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("others can reach %s; run chmod 0700 on it", dir)
	}
	return nil
}

// writePrivate replaces a file. At no moment can others read it.
func writePrivate(path string, b []byte) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Close())
}
