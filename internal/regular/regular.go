// Package regular opens files by name.
//
// A name may lead to anything. Opening a named pipe waits for a writer for ever, opening a
// device may act (a watchdog's timer starts), and reading a folder fails late with an error
// that does not say what is wrong. So the package says what a name leads to, and refuses
// everything but a file before opening it.
package regular

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Open opens a regular file for reading.
func Open(path string) (*os.File, error) { return open(path, false) }

// OpenArgument is Open for a file that an operator names. It also takes the pipe of a
// shell's <(command), and /dev/stdin at the end of a pipe.
func OpenArgument(path string) (*os.File, error) { return open(path, true) }

// Check is OpenArgument for files that a library opens. It leaves to the library what is
// missing or may not be read, and an empty path.
func Check(paths ...string) error {
	for _, path := range paths {
		f, err := OpenArgument(path)
		switch {
		case err == nil:
			f.Close()
		case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission):
			return err
		}
	}
	return nil
}

func open(path string, pipes bool) (*os.File, error) {
	var system unix.Statfs_t
	if info, err := os.Stat(path); err == nil {
		pipe := pipes && unix.Statfs(path, &system) == nil && system.Type == unix.PIPEFS_MAGIC
		if err := check(path, info, pipe); err != nil {
			return nil, err
		}
	}
	// Another file may have taken the name since. O_NONBLOCK: a named pipe must not block.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		pipe := pipes && unix.Fstatfs(int(f.Fd()), &system) == nil && system.Type == unix.PIPEFS_MAGIC
		err = check(path, info, pipe)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// check demands a regular file, or a pipe that has no name in any folder.
func check(path string, info fs.FileInfo, namelessPipe bool) error {
	mode := info.Mode()
	if mode.IsRegular() || namelessPipe {
		return nil
	}
	return &fs.PathError{Op: "open", Path: path, Err: fmt.Errorf("it is %s, not a file", kind(mode))}
}

func kind(mode fs.FileMode) string {
	switch mode.Type() {
	case fs.ModeDir:
		return "a folder"
	case fs.ModeNamedPipe:
		return "a named pipe"
	case fs.ModeSocket:
		return "a socket"
	default:
		return "a device"
	}
}
