package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/beezy-dev/kleidi/internal/ownership"
	"github.com/beezy-dev/kleidi/internal/regular"
	"github.com/beezy-dev/kleidi/seal"
)

// Read reads at most limit bytes, and one more byte of a longer file, which the parser
// then refuses.
func Read(path string, limit int64) ([]byte, error) {
	f, err := regular.OpenArgument(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit+1))
}

// ReadOwned is Read for a file that decides something. It refuses a file that users
// other than root and this process's user may change or replace.
func ReadOwned(path string, limit int64) ([]byte, error) {
	f, err := regular.OpenArgument(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := ownership.CheckOpen(f); err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(f, limit+1))
}

// MaxPublicKey bounds a file with a public key, in bytes.
const MaxPublicKey = 64 << 10

// HintRoot gives a permission error the hint to run the command as root, unless root runs
// it already.
func HintRoot(err error) error {
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		return seal.WithHint(err, "run the command as root")
	}
	return err
}

// ReadSecret reads a file of at most limit bytes. The caller clears it.
func ReadSecret(path string, limit int) ([]byte, error) {
	f, err := regular.OpenArgument(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readInOne(f, limit)
}

// readInOne reads into one buffer of full size, so that no copy stays behind.
func readInOne(f *os.File, limit int) ([]byte, error) {
	b := make([]byte, limit+1)
	n, err := io.ReadFull(f, b)
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return b[:n], nil
	}
	clear(b)
	if err == nil {
		err = fmt.Errorf("%s: it has more than %d bytes", f.Name(), limit)
	}
	return nil, err
}

// WriteNew writes a file that did not exist, durably.
func WriteNew(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w; name another file", err)
	}
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close(), SyncFolder(path))
	if err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// SyncFolder makes a new file's name durable.
func SyncFolder(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// ReadPrivateKey reads a file that nobody else may read or replace. The caller clears it.
func ReadPrivateKey(path string) ([]byte, error) {
	f, err := regular.OpenArgument(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s: mode %04o lets others use a private key; run chmod 0600 on it", path, info.Mode().Perm())
	}
	if err := ownership.CheckOpen(f); err != nil {
		return nil, err
	}
	return readInOne(f, MaxPrivateKey)
}

// MaxPrivateKey bounds a file with a private key, in bytes.
const MaxPrivateKey = 64 << 10

// Replace replaces a file in one step.
func Replace(path string, b []byte) error {
	next := path + ".new"
	if err := os.Remove(next); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := WriteNew(next, b); err != nil {
		return err
	}
	return errors.Join(os.Rename(next, path), SyncFolder(path))
}

// WriteOver writes a file, new or not, in one step, with the folders above it.
func WriteOver(path string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return Replace(path, b)
}
