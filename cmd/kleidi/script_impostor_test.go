package main

import (
	"errors"
	"net"
	"os"
	"runtime"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// nobody is a user other than kleidi's.
const nobody = 65534

// impostor listens on a socket, or on an address, as another user would: impostor
// SOCKET FILE. It writes everything that it receives to the file. It needs root.
func (h *host) impostor(_ *testscript.TestScript, args []string) error {
	l, err := net.Listen("tcp", args[0])
	if _, _, bad := net.SplitHostPort(args[0]); bad != nil {
		l, err = listenAs(nobody, h.abs(args[0]))
	}
	if err != nil {
		return broken("listen as UID %d: %w", nobody, err)
	}
	h.t.Cleanup(func() { l.Close() })
	loot, err := os.Create(h.abs(args[1]))
	if err != nil {
		return broken("%w", err)
	}
	go func() {
		defer loot.Close()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b := make([]byte, 4096)
			n, _ := c.Read(b)
			_, _ = loot.Write(b[:n])
			c.Close()
		}
	}()
	return nil
}

// listenAs makes a socket on which, according to the kernel, a process of that user
// listens: SO_PEERCRED reports the caller of listen(2). Only this thread changes its
// user.
func listenAs(uid int, path string) (net.Listener, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, err
	}
	if err := errors.Join(setThreadUID(uid), unix.Listen(fd, 8), setThreadUID(0)); err != nil {
		return nil, err
	}
	return net.FileListener(f)
}

func setThreadUID(uid int) error {
	const unchanged = ^uintptr(0)
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, unchanged, uintptr(uid), unchanged); e != 0 {
		return e
	}
	return nil
}
