package store

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrLocked says that another process holds the lock on the folder.
var ErrLocked = errors.New("in use")

// Lock is the exclusive right to change the files of a folder. The kernel releases
// it when the process ends, however it ends.
type Lock struct{ file *os.File }

// LockDir acquires the lock on dir. It does not wait: if another process holds the
// lock, the error is [ErrLocked] with that process's ID.
func LockDir(dir string) (*Lock, error) {
	dir = filepath.Clean(dir)
	if err := checkDir(dir); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "lock")
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lock(file, dir); err != nil {
		file.Close()
		return nil, err
	}
	return &Lock{file: file}, nil
}

func lock(file *os.File, dir string) error {
	err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("folder %s is %w by %s; use its admin socket or stop it", dir, ErrLocked, holder(file))
	}
	if err != nil {
		return fmt.Errorf("lock folder %s: %w", dir, err)
	}
	if err := file.Truncate(0); err != nil {
		return err
	}
	_, err = file.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}

// holder names the process whose ID is in the lock file. A process that has just
// acquired the lock may not have written its ID yet.
func holder(file *os.File) string {
	b, _ := io.ReadAll(io.NewSectionReader(file, 0, 32))
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 0 {
		return "another process"
	}
	return fmt.Sprintf("process %d", pid)
}

// Close releases the lock. It does not remove the lock file: if it did, two
// processes could hold locks on two files of the same name.
func (l *Lock) Close() error { return l.file.Close() }
