package hsm

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/seal"
)

// maxPIN bounds a PIN, in bytes.
const maxPIN = 255

// pin is a PIN and which edition of its file it was read from.
type pin struct {
	*seal.Secret
	stamp string // "" where it is from no file
}

// size is 0 for nil and closed PINs.
func (p *pin) size() (n int) {
	if p != nil && p.Secret != nil {
		p.With(func(b []byte) { n = len(b) })
	}
	return n
}

func (p *pin) close() {
	if p != nil && p.Secret != nil {
		_ = p.Close()
	}
}

// readPIN reads the first line of a file that only its owner may read.
func readPIN(mem seal.Memory, path string) (*pin, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO must not make us wait
	if err != nil {
		return nil, badPIN(path, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, badPIN(path, err)
	}
	if err := checkPINFile(info); err != nil {
		return nil, badPIN(path, err)
	}
	var buf [maxPIN + 2]byte
	defer clear(buf[:])
	n, err := f.Read(buf[:])
	if err != nil && n > 0 {
		return nil, badPIN(path, err)
	}
	line := trimLine(buf[:n])
	if len(line) == 0 || len(line) > maxPIN {
		return nil, badPIN(path, fmt.Errorf("it holds no PIN of 1 to %d bytes", maxPIN))
	}
	s, err := mem.Take(line)
	if err != nil {
		return nil, err
	}
	return &pin{Secret: s, stamp: stamp(info)}, nil
}

func badPIN(path string, err error) error {
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		err = p.Err
	}
	return seal.Errorf(seal.CauseCredentials, "put the PIN, and nothing else, into that file, owned by the user that runs kleidi and with mode 0600",
		"read the PIN file %s: %w", path, err)
}

// checkPINFile demands a regular file that belongs to root or to this user and
// that nobody else may read or write.
func checkPINFile(info fs.FileInfo) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.Mode().IsRegular():
		return errors.New("it is no regular file")
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("its mode is %04o: others than its owner may use it", info.Mode().Perm())
	case !ok || st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return errors.New("it belongs to another user")
	}
	return nil
}

// stamp names one edition of a file: it changes when the file is written or replaced.
func stamp(info fs.FileInfo) string {
	st, _ := info.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%d %d %d", st.Dev, st.Ino, info.ModTime().UnixNano())
}

// trimLine cuts b before its first line end.
func trimLine(b []byte) []byte {
	if i := bytes.IndexAny(b, "\r\n"); i >= 0 {
		return b[:i]
	}
	return b
}
