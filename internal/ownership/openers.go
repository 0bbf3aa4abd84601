package ownership

import (
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// accounts are the files that list the members of groups.
type accounts struct{ passwd, group string }

// Openers names the users other than root and this process's own that may open the device
// or the socket at path; "" means nobody. A group counts if it has members, according to
// /etc/group and /etc/passwd. An account with the group's own name, such as tss, is a
// service account and does not count.
func Openers(path string) (string, error) {
	return accounts{"/etc/passwd", "/etc/group"}.openers(path)
}

// openBits are the mode bits that let other users open the file: a device by reading it,
// a socket by writing to it.
func openBits(mode uint32) uint32 {
	if mode&unix.S_IFMT == unix.S_IFSOCK {
		return 0o022
	}
	return 0o066
}

func (a accounts) openers(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	open := st.Mode & openBits(st.Mode)
	if open&0o006 != 0 {
		return fmt.Sprintf("every user (%s has mode %04o)", path, st.Mode&0o7777), nil
	}
	users, name, err := a.members(st.Gid)
	if err != nil {
		return "", err
	}
	var all []string
	if owner := a.user(st.Uid); st.Uid != 0 && int(st.Uid) != os.Geteuid() && owner != name {
		all = append(all, "its owner "+owner)
	}
	if open&0o060 != 0 && len(users) > 0 {
		all = append(all, fmt.Sprintf("%s, by group %s", strings.Join(users, ", "), name))
	}
	return strings.Join(all, "; "), nil
}

// members returns the accounts in a group, without root and the group's own account, and
// the group's name.
func (a accounts) members(gid uint32) (users []string, name string, err error) {
	id := strconv.FormatUint(uint64(gid), 10)
	groups, err := lines(a.group)
	if err != nil {
		return nil, "", err
	}
	name = "GID " + id
	for _, f := range groups {
		if len(f) >= 4 && f[2] == id {
			name = f[0]
			users = append(users, strings.FieldsFunc(f[3], func(r rune) bool { return r == ',' })...)
		}
	}
	all, err := lines(a.passwd)
	if err != nil {
		return nil, "", err
	}
	for _, f := range all {
		if len(f) >= 4 && f[3] == id {
			users = append(users, f[0])
		}
	}
	users = slices.DeleteFunc(users, func(u string) bool { return u == "root" || u == name })
	slices.Sort(users)
	return slices.Compact(users), name, nil
}

// user returns an account's name.
func (a accounts) user(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	all, _ := lines(a.passwd) // without the file, the number must do
	for _, f := range all {
		if len(f) >= 3 && f[2] == id {
			return f[0]
		}
	}
	return "UID " + id
}

// lines returns the fields of each line. A missing file, as in a container without
// accounts, has none.
func lines(path string) (all [][]string, err error) {
	b, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		all = append(all, strings.Split(strings.TrimSuffix(line, "\n"), ":"))
	}
	return all, nil
}
