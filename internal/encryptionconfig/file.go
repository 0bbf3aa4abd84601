package encryptionconfig

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/seal"
)

// maxSize bounds a file, in bytes.
const maxSize = 1 << 20

// Read reads and parses a file.
func Read(path string) (*EncryptionConfiguration, error) {
	b, err := readAll(path)
	if err != nil {
		return nil, err
	}
	e, err := Parse(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return e, nil
}

// readAll refuses a file that is too large. What precedes the limit may well parse, and
// resources after it would be lost.
func readAll(path string) ([]byte, error) {
	b, err := files.Read(path, maxSize)
	if err == nil && len(b) > maxSize {
		return nil, fmt.Errorf("%s has more than %d bytes, too many for an %s", path, maxSize, kind)
	}
	return b, err
}

// WriteNew writes a new file. It accepts an existing file with the same content.
func (e *EncryptionConfiguration) WriteNew(path string) error {
	if err := e.CheckNew(path); err != nil {
		return err
	}
	return files.HintRoot(files.WriteOver(path, []byte(e.YAML())))
}

// CheckNew refuses to replace other content: it may hold the only copy of a key under
// which objects are stored.
func (e *EncryptionConfiguration) CheckNew(path string) error {
	former, err := files.Read(path, maxSize)
	switch {
	case errors.Is(err, fs.ErrNotExist) || err == nil && bytes.Equal(former, []byte(e.YAML())):
		return nil
	case err != nil:
		return files.HintRoot(err)
	}
	return seal.Errorf("", "if kube-apiserver reads that file, move to kleidi in steps: kleidi encryption-config --from "+seal.Quote(path)+"; otherwise name another file", "%s exists with another content", path)
}

// managed is the end of the path of the file that k3s and RKE2 write themselves.
const managed = "/server/cred/encryption-config.json"

// Written is the result of [EncryptionConfiguration.Write].
type Written struct {
	// SHA256 is the digest of the file, by which kube-apiserver's metrics name it.
	SHA256 string
	// Former is the path of the copy of the replaced file, or empty if nothing had to
	// change.
	Former string
}

// Write replaces a file with the configuration in one step, and keeps a copy of the
// former file. Only the former owner and root may read either file, because both may hold
// keys.
func (e *EncryptionConfiguration) Write(path string) (w Written, err error) {
	if absolute, err := filepath.Abs(path); err == nil && strings.HasSuffix(absolute, managed) {
		return w, seal.Errorf("", "name another file with --file, and give it to kube-apiserver as encryption-provider-config in kube-apiserver-arg, see docs/migration.md",
			"k3s and RKE2 write %s themselves", path)
	}
	b := []byte(e.YAML())
	w.SHA256 = fmt.Sprintf("sha256:%x", sha256.Sum256(b))
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	former, err := readAll(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return w, files.WriteOver(path, b)
	case err != nil || bytes.Equal(former, b):
		return w, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return w, err
	}
	w.Former = path + "." + time.Now().UTC().Format("20060102T150405.000Z")
	if err := writeAs(w.Former, former, info); err != nil {
		return w, err
	}
	next := path + ".new"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return w, err
	}
	if err := writeAs(next, b, info); err != nil {
		return w, err
	}
	return w, errors.Join(os.Rename(next, path), files.SyncFolder(path))
}

// writeAs writes a new file with the owner of another file.
func writeAs(path string, b []byte, owned fs.FileInfo) error {
	if err := files.WriteNew(path, b); err != nil {
		return err
	}
	if s, ok := owned.Sys().(*syscall.Stat_t); ok && (int(s.Uid) != os.Geteuid() || int(s.Gid) != os.Getegid()) {
		if err := os.Chown(path, int(s.Uid), int(s.Gid)); err != nil {
			return errors.Join(err, os.Remove(path))
		}
	}
	return nil
}
