// Package ownership verifies that only root and the user of this process decide where a
// path leads.
//
// A file is as trustworthy as every folder on the way to it: the owner of a parent can
// rename the folder away and put another in its place, whatever the file's own mode
// says. So the package follows a path from the root, one name and one symbolic link at
// a time, and judges each folder in which it looks up a name.
//
// It accepts a folder that everybody may write if the folder is sticky, such as /tmp:
// there only the owner of an entry, the owner of the folder and root can rename or
// remove the entry. The owner of the entry is judged next.
package ownership

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/seal"
)

// maxLinks bounds the symbolic links on one path, as Linux does (path_resolution(7)).
const maxLinks = 40

// writable are the permission bits that let users other than the owner write.
const writable = 0o022

// CheckFile returns an error, with a command that helps, if anybody except root and
// this process's user could change or replace the file at path.
func CheckFile(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return checkFile(path, &st)
}

// CheckOpen is CheckFile for an open file, under the name by which it was opened. The
// judged file is the one that is read, even if the name leads elsewhere by now.
func CheckOpen(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return &fs.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	return checkFile(f.Name(), &st)
}

func checkFile(path string, st *unix.Stat_t) error {
	if kind := st.Mode & unix.S_IFMT; kind == unix.S_IFIFO || kind == unix.S_IFCHR {
		return checkOwner("file", path, st) // no name leads to a shell's <(command), or to /dev/stdin
	}
	if err := walk(path); err != nil {
		return err
	}
	return checkEntry("file", path, st)
}

// CheckFolder is CheckFile for a folder and for its entries.
func CheckFolder(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if err := walk(path); err != nil {
		return err
	}
	return checkEntry("folder", path, &st)
}

func checkEntry(kind, path string, st *unix.Stat_t) error {
	if err := checkOwner(kind, path, st); err != nil {
		return err
	}
	if kind == "folder" && sticky(st) {
		return refusal("use a folder of its own", "folder %s has mode %04o, so other users may be first to put something there", path, st.Mode&0o7777)
	}
	if st.Mode&writable != 0 {
		return refusal("chmod go-w "+word(path), "%s %s has mode %04o, so others can change it", kind, path, st.Mode&0o7777)
	}
	return nil
}

func checkOwner(kind, path string, st *unix.Stat_t) error {
	if st.Uid == 0 || int(st.Uid) == os.Geteuid() {
		return nil
	}
	chown := "chown root"
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		chown = "chown -h root"
	}
	return refusal(chown+" "+word(path), "%s %s belongs to UID %d, who can change it", kind, path, st.Uid)
}

// StickyAbove returns a folder above path, such as /tmp, in which other users may make
// entries, or "" if there is none. path is as safe as the owner of its own folder while
// that folder exists. If /tmp is emptied at boot, another user may be the first to make
// it.
func StickyAbove(path string) string {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return ""
	}
	for path != "/" {
		path = filepath.Dir(path)
		var st unix.Stat_t
		if unix.Lstat(path, &st) == nil && sticky(&st) {
			return path
		}
	}
	return ""
}

// sticky reports whether everybody, or a group, may add entries to the folder, and
// nobody may remove the entries of others.
func sticky(st *unix.Stat_t) bool { return st.Mode&unix.S_ISVTX != 0 && st.Mode&writable != 0 }

// walk judges every folder in which a name of path is looked up.
func walk(path string) error {
	if !filepath.IsAbs(path) {
		dir, err := os.Getwd()
		if err != nil {
			return err
		}
		path = dir + "/" + path // not cleaned: after a symbolic link, ".." is another folder
	}
	at, rest, links := "/", split(path), 0
	for len(rest) > 0 {
		name := rest[0]
		rest = rest[1:]
		switch name {
		case ".":
			continue
		case "..":
			at = filepath.Dir(at)
			continue
		}
		folder, err := checkPassed(at)
		if err != nil {
			return err
		}
		at = filepath.Join(at, name)
		target, err := checkLink(at, folder)
		if err != nil {
			return err
		}
		if target == "" {
			continue
		}
		if links++; links > maxLinks {
			return &fs.PathError{Op: "follow", Path: path, Err: unix.ELOOP}
		}
		rest = append(split(target), rest...)
		if at = filepath.Dir(at); filepath.IsAbs(target) {
			at = "/"
		}
	}
	return nil
}

func split(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}

// checkPassed judges a folder on the way.
func checkPassed(dir string) (*unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return nil, &fs.PathError{Op: "lstat", Path: dir, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, &fs.PathError{Op: "follow", Path: dir, Err: unix.ENOTDIR}
	}
	if st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return nil, refusal("chown root "+word(dir), "folder %s belongs to UID %d, who can replace what is below it", dir, st.Uid)
	}
	if st.Mode&writable != 0 && !sticky(&st) {
		return nil, refusal("chmod go-w "+word(dir), "folder %s has mode %04o, so others can replace what is below it", dir, st.Mode&0o7777)
	}
	return &st, nil
}

// refusal is an error with a command that helps.
func refusal(remedy, format string, args ...any) error {
	return seal.Errorf(seal.CauseConfiguration, remedy, format, args...)
}

// word returns a path as an argument of a command, never mistaken for a flag.
func word(path string) string {
	if strings.HasPrefix(path, "-") {
		path = "./" + path
	}
	return seal.Quote(path)
}

// checkLink returns the target of path if it is a symbolic link, and "" otherwise. In a
// sticky folder the link's owner could replace it.
func checkLink(path string, folder *unix.Stat_t) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return "", &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		return "", nil
	}
	if sticky(folder) {
		if err := checkOwner("symbolic link", path, &st); err != nil {
			return "", err
		}
	}
	return os.Readlink(path)
}
