// Package ownership verifies that nobody but root and the user of this process
// decides what a path leads to.
//
// A file is as trustworthy as every folder on the way to it: the owner of a parent
// can rename the folder away and put another in its place, whatever the file's own
// mode says. So a path is followed from the root, one name and one symbolic link at a
// time, and each folder that a name is looked up in is judged.
//
// A folder that everybody may write is accepted on the way where it is sticky, as /tmp
// is: there only the owner of an entry, the owner of the folder and root can rename or
// remove it, and the entry's owner is judged next.
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

// writable are the permission bits that let others than the owner write.
const writable = 0o022

// CheckFile returns an error, with the command that helps, if anybody but root and
// this process's user could change the file at path or put another in its place.
func CheckFile(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return checkFile(path, &st)
}

// CheckOpen does the same for a file that is open, under the name that it was opened by.
// What is read from it is what was judged, also where its name leads elsewhere by now.
func CheckOpen(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return &fs.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	return checkFile(f.Name(), &st)
}

func checkFile(path string, st *unix.Stat_t) error {
	if kind := st.Mode & unix.S_IFMT; kind == unix.S_IFIFO || kind == unix.S_IFCHR {
		return checkOwner("file", path, st) // a shell's <(command), or /dev/stdin: no name leads to it
	}
	if err := walk(path); err != nil {
		return err
	}
	return checkEntry("file", path, st)
}

// CheckFolder does the same for a folder, and for what lies directly in it.
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
// entries, or "" if there is none. Path is as safe as its own folder's owner while that
// folder is there; where /tmp is emptied at boot, another user may be first to make it.
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

// sticky reports whether everybody, or a group, may put entries of their own into the
// folder, and nobody may take away those of others.
func sticky(st *unix.Stat_t) bool { return st.Mode&unix.S_ISVTX != 0 && st.Mode&writable != 0 }

// walk judges every folder in which a name of path is looked up.
func walk(path string) error {
	if !filepath.IsAbs(path) {
		dir, err := os.Getwd()
		if err != nil {
			return err
		}
		path = dir + "/" + path // not cleaned: behind a symbolic link, ".." is another folder
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

// refusal is an error with the command that helps.
func refusal(remedy, format string, args ...any) error {
	return seal.Errorf(seal.CauseConfiguration, remedy, format, args...)
}

// word is a path as a command takes it, and not for a flag.
func word(path string) string {
	if strings.HasPrefix(path, "-") {
		path = "./" + path
	}
	return seal.Quote(path)
}

// checkLink returns where path leads to if it is a symbolic link, and "" if it is none.
// In a sticky folder the link's owner could replace it.
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
