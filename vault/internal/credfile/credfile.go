// Package credfile reads credentials and certificates from files that nobody else may
// change.
package credfile

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/beezy-dev/kleidi/internal/ownership"
	"github.com/beezy-dev/kleidi/internal/regular"
	"github.com/beezy-dev/kleidi/seal"
)

// Maximum sizes of files in bytes.
const (
	MaxCredential = 16 << 10
	MaxPEM        = 1 << 20
)

// Readers says who may read a file.
type Readers int

const (
	OwnerOnly Readers = iota // of a credential
	Anyone                   // of public data, or of a projected token, which its folder protects
)

// ErrNoCertificate says that a CA file holds no certificate.
var ErrNoCertificate = errors.New("no PEM certificate in it")

// Read returns the content of a regular file of at most limit bytes, which the caller
// clears, if nobody but root and this user may change or replace it. setting is the name
// of the setting in the configuration.
func Read(setting, path string, limit int, allowed Readers) ([]byte, error) {
	b, err := readRegular(path, limit, allowed)
	if err != nil {
		return nil, seal.Caused(seal.CauseCredentials, "put the right file there, or correct vault."+setting, "vault."+setting+": "+path, err)
	}
	return b, nil
}

func readRegular(path string, limit int, allowed Readers) ([]byte, error) {
	f, err := regular.Open(path)
	if err != nil {
		return nil, withoutPath(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, withoutPath(err)
	}
	switch {
	case allowed == OwnerOnly && info.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("mode %04o lets others read it (run chmod 600)", info.Mode().Perm())
	case info.Size() > int64(limit):
		return nil, fmt.Errorf("%d bytes, at most %d", info.Size(), limit)
	}
	if err := ownership.CheckOpen(f); err != nil {
		return nil, err
	}
	// One byte more than the limit shows whether the file has grown. A second buffer
	// would stay uncleared.
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

// withoutPath removes the path from an error, because the caller names it.
func withoutPath(err error) error {
	if e, ok := errors.AsType[*os.PathError](err); ok {
		return e.Err
	}
	return err
}

// With calls use with the credential in a file: one line of printable characters.
// It reads the file each time, and clears the credential afterwards.
func With(setting, path string, allowed Readers, use func(credential []byte) error) error {
	b, err := Read(setting, path, MaxCredential, allowed)
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

// Roots returns the certificates in a CA file. For an empty path it returns nil, which
// stands for the certificates of the system.
func Roots(path string) (*x509.CertPool, error) {
	if path == "" {
		return nil, nil
	}
	b, err := Read("caFile", path, MaxPEM, Anyone)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, seal.Errorf(seal.CauseCredentials, "put the CA's certificates there, or correct vault.caFile",
			"vault.caFile: %s: %w", path, ErrNoCertificate)
	}
	return pool, nil
}
