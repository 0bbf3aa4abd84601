package vault

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/beezy-dev/kleidi/seal"
	"golang.org/x/sys/unix"
)

// Limits of files, in bytes.
const (
	maxCredential = 16 << 10
	maxPEM        = 1 << 20
)

// who may read a file.
type who int

const (
	ownerOnly who = iota // a credential: nobody else
	anybody              // public, or a projected token: its folder is what protects it
)

// errNoCertificate says that a CA file is of no use.
var errNoCertificate = errors.New("no PEM certificate in it")

// readFile reads a regular file of at most limit bytes into memory that the caller
// clears. setting is the name of the key in the configuration.
func readFile(setting, path string, limit int, may who) ([]byte, error) {
	b, err := readRegular(path, limit, may)
	if err != nil {
		return nil, seal.Errorf(seal.CauseCredentials, "put the right file there, or correct vault."+setting, "vault.%s: %s: %w", setting, path, err)
	}
	return b, nil
}

func readRegular(path string, limit int, may who) ([]byte, error) {
	// A FIFO would wait for its writer
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, bare(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, bare(err)
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, errors.New("not a regular file")
	case may == ownerOnly && info.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("mode %04o lets others read it (run chmod 600)", info.Mode().Perm())
	case info.Size() > int64(limit):
		return nil, fmt.Errorf("%d bytes, at most %d", info.Size(), limit)
	}
	// One more, to see that it has not grown; never a second buffer, which nobody would clear
	b := make([]byte, limit+1)
	n, err := io.ReadFull(f, b)
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		clear(b)
		if err == nil {
			return nil, fmt.Errorf("more than %d bytes", limit)
		}
		return nil, errors.New("it is empty")
	}
	return b[:n:n], nil
}

// bare drops the path, which the caller names.
func bare(err error) error {
	if e, ok := errors.AsType[*os.PathError](err); ok {
		return e.Err
	}
	return err
}

// withCredential calls use with the credential that a file holds: one line of
// printable characters. It is read anew at every login, and cleared.
func withCredential(setting, path string, may who, use func(credential []byte) error) error {
	b, err := readFile(setting, path, maxCredential, may)
	if err != nil {
		return err
	}
	defer clear(b)
	line := bytes.TrimRight(b, "\r\n")
	if len(line) == 0 || bytes.ContainsFunc(line, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return seal.Errorf(seal.CauseCredentials, "put the credential there, on one line and nothing else",
			"vault.%s: %s: not one line of printable characters", setting, path)
	}
	return use(line)
}

// roots returns the certificates of a CA file, or nil, which means the system's.
func roots(path string) (*x509.CertPool, error) {
	if path == "" {
		return nil, nil
	}
	b, err := readFile("caFile", path, maxPEM, anybody)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, seal.Errorf(seal.CauseCredentials, "put the CA's certificates there, or correct vault.caFile",
			"vault.caFile: %s: %w", path, errNoCertificate)
	}
	return pool, nil
}
