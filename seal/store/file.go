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

// MaxSize is the maximum size of a file in bytes.
const MaxSize = 1 << 20

// ErrConflict says that the file changed after the caller had loaded it.
var ErrConflict = errors.New("changed meanwhile; run the command again")

// Version identifies the content of a file. It is opaque. A file that does not
// exist has the empty Version.
type Version string

func versionOf(b []byte) Version {
	sum := sha256.Sum256(b)
	return Version(hex.EncodeToString(sum[:]))
}

// File is a durable file. [PrepareDir] must accept its folder.
type File struct {
	path   string
	former string            // former name, or empty
	keep   func([]byte) bool // see Keep; nil keeps every content
	mu     sync.Mutex
}

// NewFile returns the File at path. The file need not exist.
func NewFile(path string) *File { return &File{path: filepath.Clean(path)} }

// Keep makes Save keep the content that it replaces as the previous content, but
// only if keep returns true for it. A damaged file then does not replace an
// undamaged previous one. Keep returns f.
func (f *File) Keep(keep func(content []byte) bool) *File {
	f.keep = keep
	return f
}

// Formerly sets the name that the file had in an earlier version of kleidi, in the
// same folder. If no file has the present name, Load renames the file with the
// former name, and its previous file too. Formerly returns f.
func (f *File) Formerly(name string) *File {
	f.former = filepath.Join(filepath.Dir(f.path), name)
	return f
}

// Path returns the path of the file.
func (f *File) Path() string { return f.path }

// Load returns the content of the file and its version. The error is
// fs.ErrNotExist if there is no file. Load refuses a symbolic link, a file that
// others may write, and a file of more than MaxSize bytes.
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

// rename renames the file and its previous file from the former name to the present
// one. It replaces no file that already has the present name.
func (f *File) rename() error {
	for _, suffix := range []string{previousSuffix, ""} {
		err := unix.Renameat2(unix.AT_FDCWD, f.former+suffix, unix.AT_FDCWD, f.path+suffix, unix.RENAME_NOREPLACE)
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("rename %s to %s: %w", f.former+suffix, f.path+suffix, err)
		}
	}
	return syncDir(filepath.Dir(f.path))
}

// Previous returns the content that the last Save replaced. The error is
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
	// O_NONBLOCK: if somebody put a FIFO there, opening it must not block.
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, "", fmt.Errorf("%s is a symbolic link; put the file itself in its place", path)
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
		return nil, "", fmt.Errorf("%s is not a regular file; remove it", path)
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

// Save replaces the content with b if its version is old, and returns the version
// of b. The empty version demands that there is no file. If Save returns no error,
// b is on the disk, and the replaced content is the previous content. If Save
// fails, the file still has its old content, with one exception: if the last step,
// the flush of the folder, fails, the file has the new content, and a crash may
// bring back the old one.
//
// Save takes five steps: write a temporary file in the same folder, with mode 0600;
// flush it; link the old file as the previous one; rename the temporary file to
// its final name; flush the folder. The file is whole after each step. The next
// Save removes what a crash left behind.
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
	if err := f.replace(b, exists && (f.keep == nil || f.keep(current))); err != nil {
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

// keepPrevious makes the current file the previous one too. It replaces the former
// previous file in one step, by renaming a second link to the current file.
func (f *File) keepPrevious() error {
	tmp := f.temporary()
	if err := os.Link(f.path, tmp); err != nil {
		return err
	}
	err := os.Rename(tmp, f.previous())
	// After a crash the previous file may already be the current one. To rename one
	// link of a file to another does nothing, and leaves both links.
	if rmErr := os.Remove(tmp); err == nil && rmErr != nil && !errors.Is(rmErr, fs.ErrNotExist) {
		err = rmErr
	}
	return err
}

// Remove removes the file and everything that earlier versions of it left: the previous
// content, temporary files, and files of the former name. The file itself goes last, so
// that Remove can be repeated after a crash. A missing file is not an error.
func (f *File) Remove(ctx context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	dir := filepath.Dir(f.path)
	if err := errors.Join(ctx.Err(), checkDir(dir)); err != nil {
		return err
	}
	if err := f.sweep(); err != nil {
		return err
	}
	for _, path := range f.Paths() {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return syncDir(dir)
}

// Paths returns the paths of the file, of its previous content, and of both under the
// former name. The file itself is the last one.
func (f *File) Paths() []string {
	paths := []string{f.previous(), f.path}
	if f.former != "" {
		paths = append([]string{f.former + previousSuffix, f.former}, paths...)
	}
	return paths
}

func (f *File) temporaryPrefix() string { return "." + filepath.Base(f.path) + ".tmp-" }

func (f *File) temporary() string {
	return filepath.Join(filepath.Dir(f.path), f.temporaryPrefix()+rand.Text())
}

// sweep removes the temporary files that crashes left behind.
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

// writeNew creates a file with content b and flushes it. The file must not exist.
// If writeNew fails, it leaves no file.
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
