package ownership

import (
	"net"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	tss     = 108
	nothing = 109 // a group without members
)

// TestOpeners: devices as distributions set them up, and sockets.
func TestOpeners(t *testing.T) {
	r := newTree(t)
	write := func(name, text string) string {
		if err := os.WriteFile(r.path(name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return r.path(name)
	}
	a := accounts{write("passwd", "root:x:0:0::/root:/bin/sh\ntss:x:107:108::/:/bin/false\neve:x:1000:1000::/:/bin/sh\nprim:x:1001:108::/:/bin/sh\n"),
		write("group", "root:x:0:bob\ntss:x:108:eve,tss\nempty:x:109:\n")}
	alone := accounts{a.passwd, write("alone", "tss:x:108:tss\n")}
	alone.passwd = write("accounts", "tss:x:107:108::/:/bin/false\n")
	unnamed := accounts{write("unnamed", "eve:x:1000:4712::/:/bin/sh\n"), a.group}
	if err := unix.Mknod(r.path("tpm"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", r.path("sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for name, c := range map[string]struct {
		accounts
		path     string
		mode     os.FileMode
		uid, gid int
		want     string
	}{
		"root's":                  {a, "tpm", 0o600, 0, 0, ""},
		"group tss with members":  {a, "tpm", 0o660, 0, tss, "eve, prim, by group tss"},
		"group tss, service only": {alone, "tpm", 0o660, 107, tss, ""},
		"nobody in the group":     {a, "tpm", 0o660, 0, nothing, ""},
		"root's group":            {a, "tpm", 0o660, 0, 0, "bob, by group root"},
		"the group may not":       {a, "tpm", 0o600, 0, tss, ""},
		"reading is enough":       {a, "tpm", 0o640, 0, tss, "eve, prim, by group tss"},
		"another owner":           {a, "tpm", 0o600, 1000, 0, "its owner eve"},
		"an owner without a name": {a, "tpm", 0o600, 4711, 0, "its owner UID 4711"},
		"owner and group":         {a, "tpm", 0o660, 1000, tss, "its owner eve; eve, prim, by group tss"},
		"a group no file names":   {a, "tpm", 0o660, 0, 4712, ""},
		"members of such a group": {unnamed, "tpm", 0o660, 0, 4712, "eve, by group GID 4712"},
		"everybody":               {a, "tpm", 0o666, 0, 0, "every user (" + r.path("tpm") + " has mode 0666)"},
		"a socket as made":        {a, "sock", 0o755, 0, tss, ""},
		"a socket of a group":     {a, "sock", 0o775, 0, tss, "eve, prim, by group tss"},
		"a socket for all":        {a, "sock", 0o777, 0, 0, "every user (" + r.path("sock") + " has mode 0777)"},
		"no accounts at all":      {accounts{"/nowhere", "/nowhere"}, "tpm", 0o660, 0, tss, ""},
	} {
		r.own(c.path, c.mode, 0)
		if err := os.Chown(r.path(c.path), c.uid, c.gid); err != nil {
			t.Fatal(err)
		}
		if got, err := c.openers(r.path(c.path)); err != nil || got != c.want {
			t.Errorf("%s: %q, %v, want %q", name, got, err, c.want)
		}
	}
	if _, err := Openers(r.path("missing")); !os.IsNotExist(err) {
		t.Errorf("a device that is missing: %v", err)
	}
	r.own("tpm", 0o600, 0)
	r.own("..", 0o755, 0)
	if err := os.Chown(r.path("tpm"), 0, nothing); err != nil {
		t.Fatal(err)
	}
	asUser(t, 4711, func() {
		if got, err := a.openers(r.path("tpm")); err != nil || got != "" {
			t.Errorf("root counts as a stranger to a process that is not root's: %q, %v", got, err)
		}
	})
}

// asUser runs f on a thread of a user who is not root.
func asUser(t *testing.T, uid uintptr, f func()) {
	t.Helper()
	done := make(chan unix.Errno)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with the goroutine
		_, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid)
		if errno == 0 {
			f()
		}
		done <- errno
	}()
	if errno := <-done; errno != 0 {
		t.Fatal(errno)
	}
}
