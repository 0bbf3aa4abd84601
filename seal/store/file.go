package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// MaxSize bounds a file, in bytes.
const MaxSize = 1 << 20

// ErrConflict says that the file is not the one that the change was made from.
var ErrConflict = errors.New("changed meanwhile; run the command again")

// Version names the content of a file. It is opaque; the empty Version is that
// of a file that does not exist.
type Version string

func versionOf(b []byte) Version {
	sum := sha256.Sum256(b)
	return Version(hex.EncodeToString(sum[:]))
}

// File is one durable file. Its folder must be as [PrepareDir] leaves it.
type File struct {
	path   string
	former string            // empty: it never had another name
	worth  func([]byte) bool // nil: everything is
	mu     sync.Mutex
}

// NewFile returns the file at path, which need not exist.
func NewFile(path string) *File { return &File{path: filepath.Clean(path)} }

// Keep says which contents are worth being kept as the previous one; without it
// all are. What is damaged must not take the place of what is whole.
func (f *File) Keep(worth func(b []byte) bool) *File {
	f.worth = worth
	return f
}

// Formerly gives the file's earlier name in the same folder. Where no file has the
// present name, Load renames the one with the earlier name, once, and its previous
// content with it.
func (f *File) Formerly(name string) *File {
	f.former = filepath.Join(filepath.Dir(f.path), name)
	return f
}

// Path returns where the file is.
func (f *File) Path() string { return f.path }

// Load returns the content and its version. The error is fs.ErrNotExist if there
// is no file. A symbolic link, a file that others may write, and one of more
// than MaxSize bytes are refused.
func (f *File) Load(ctx context.Context) ([]byte, Version, error) {
	b, version, err := f.load(ctx, f.path)
	if f.former == "" || !errors.Is(err, fs.ErrNotExist) {
		return b, version, err
	}
	switch err := f.rename(); {
	case errors.Is(err, unix.EROFS):
		return f.load(ctx, f.former)
	case err != nil:
		return nil, "", err
	}
	return f.load(ctx, f.path)
}

// rename gives the file with the earlier name its present one. A file that got the
// present name in the meantime stays.
func (f *File) rename() error {
	for _, suffix := range []string{previousSuffix, ""} {
		err := unix.Renameat2(unix.AT_FDCWD, f.former+suffix, unix.AT_FDCWD, f.path+suffix, unix.RENAME_NOREPLACE)
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("rename %s to %s: %w", f.former+suffix, f.path+suffix, err)
		}
	}
	return syncDir(filepath.Dir(f.path))
}

// Previous returns the content that the last Save replaced; the error is
// fs.ErrNotExist if there was none.
func (f *File) Previous(ctx context.Context) ([]byte, error) {
	b, _, err := f.load(ctx, f.previous())
	return b, err
}

const previousSuffix = ".previous"

func (f *File) previous() string { return f.path + previousSuffix }

func (f *File) load(ctx context.Context, path string) ([]byte, Version, error) {
	if err := ctx.Err(); err != nil {
		return nil, "", err
	}
	if err := checkDir(filepath.Dir(path)); err != nil {
		return nil, "", err
	}
	// O_NONBLOCK: opening a FIFO that somebody put there must not wait.
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, "", fmt.Errorf("%s is a symbolic link; put the file itself there", path)
	}
	if err != nil {
		return nil, "", err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, "", err
	}
	if !info.Mode().IsRegular() {
		return nil, "", fmt.Errorf("%s is no regular file; remove it", path)
	}
	if err := checkAccess(path, info); err != nil {
		return nil, "", err
	}
	b, err := io.ReadAll(io.LimitReader(file, MaxSize+1))
	if err != nil {
		return nil, "", err
	}
	if len(b) > MaxSize {
		return nil, "", fmt.Errorf("%s has more than %d bytes; restore it from a backup", path, MaxSize)
	}
	return b, versionOf(b), nil
}

// Save replaces the content that has version old (empty: there is no file) by b
// and returns b's version. When it returns without error, b is on the disk; what
// it replaced is kept as the previous content. On an error the old content is
// still there, except that a failure to flush the folder, after the new file has
// taken its place, leaves open which one a crash would bring back.
//
// The steps, each of which leaves a whole file behind: write a temporary file in
// the same folder (0600), flush it, link the old file as the previous one, rename
// the temporary file to its place, flush the folder. What a crash leaves behind
// is removed by the next Save.
func (f *File) Save(ctx context.Context, b []byte, old Version) (Version, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(b) > MaxSize {
		return "", fmt.Errorf("save %s: %d bytes, at most %d", f.path, len(b), MaxSize)
	}
	current, version, err := f.Load(ctx)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("save %s: %w", f.path, err)
	}
	exists := err == nil
	if version != old {
		return "", fmt.Errorf("save %s: %w", f.path, ErrConflict)
	}
	if exists && bytes.Equal(current, b) {
		return version, syncDir(filepath.Dir(f.path)) // an earlier flush may have failed
	}
	if err := f.replace(b, exists && (f.worth == nil || f.worth(current))); err != nil {
		return "", fmt.Errorf("save %s: %w", f.path, err)
	}
	return versionOf(b), nil
}

func (f *File) replace(b []byte, keep bool) error {
	if err := f.sweep(); err != nil {
		return err
	}
	tmp := f.temporary()
	if err := writeNew(tmp, b); err != nil {
		return err
	}
	if keep {
		if err := f.keepPrevious(); err != nil {
			_ = os.Remove(tmp)
			return err
		}
	}
	if err := os.Rename(tmp, f.path); err != nil {
		_ = os.Remove(tmp)
		return err
	}
	return syncDir(filepath.Dir(f.path))
}

// keepPrevious gives the current file a second name, which takes the place of
// the previous one in one step.
func (f *File) keepPrevious() error {
	tmp := f.temporary()
	if err := os.Link(f.path, tmp); err != nil {
		return err
	}
	err := os.Rename(tmp, f.previous())
	// After a crash the previous file may be the current one already, and a
	// rename between two names of one file does nothing: it leaves both.
	if rmErr := os.Remove(tmp); err == nil && rmErr != nil && !errors.Is(rmErr, fs.ErrNotExist) {
		err = rmErr
	}
	return err
}

func (f *File) temporaryPrefix() string { return "." + filepath.Base(f.path) + ".tmp-" }

func (f *File) temporary() string {
	return filepath.Join(filepath.Dir(f.path), f.temporaryPrefix()+rand.Text())
}

// sweep removes what crashes left behind.
func (f *File) sweep() error {
	dir := filepath.Dir(f.path)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), f.temporaryPrefix()) {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// writeNew writes a file that did not exist and flushes it; it leaves none on error.
func writeNew(path string, b []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(b)
	if err == nil {
		err = file.Sync()
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		_ = os.Remove(path)
	}
	return err
}
