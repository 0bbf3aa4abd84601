// Package pinfile reads the PIN of a token from a file.
package pinfile

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/beezy-dev/kleidi/internal/ownership"
	"github.com/beezy-dev/kleidi/internal/regular"
	"github.com/beezy-dev/kleidi/seal"
)

// MaxPIN is the maximum size of a PIN in bytes.
const MaxPIN = 255

// Read reads a PIN of 1 to 255 bytes from the first line of a file that only its owner
// may read. Its errors have the cause [seal.CauseCredentials] and do not quote the file.
func Read(mem seal.Memory, path string) (*seal.Secret, error) {
	f, err := regular.Open(path)
	if err != nil {
		return nil, badPIN(path, err)
	}
	defer f.Close()
	if err := checkPINFile(f); err != nil {
		return nil, badPIN(path, err)
	}
	var buf [MaxPIN + 2]byte
	defer clear(buf[:])
	n, err := f.Read(buf[:])
	if err != nil && n > 0 {
		return nil, badPIN(path, err)
	}
	line := trimLine(buf[:n])
	if len(line) == 0 || len(line) > MaxPIN {
		return nil, badPIN(path, fmt.Errorf("it holds no PIN of 1 to %d bytes", MaxPIN))
	}
	return mem.Take(line)
}

func badPIN(path string, err error) error {
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		err = p.Err
	}
	return seal.Caused(seal.CauseCredentials, "put the PIN, and nothing else, into that file, owned by the user that runs kleidi and with mode 0600",
		"read the PIN file "+path, err)
}

// checkPINFile demands a file that belongs to root or to this user, that nobody
// else may read, and that nobody else may change or replace.
func checkPINFile(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("its mode is %04o: users other than its owner may use it", info.Mode().Perm())
	}
	return ownership.CheckOpen(f)
}

// trimLine returns the first line of b, without its end.
func trimLine(b []byte) []byte {
	if i := bytes.IndexAny(b, "\r\n"); i >= 0 {
		return b[:i]
	}
	return b
}
