package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/internal/founding"
)

// readBack runs a command that shows an identity, and types the identity: readback [pty]
// [WRONG] ARG..., where WRONG is the number of wrong lines before it. The identity is
// kept in shown.txt; stdout is everything that a person saw.
func (h *host) readBack(ts *testscript.TestScript, args []string) error {
	terminal := args[0] == "pty"
	if terminal {
		args = args[1:]
	}
	wrong := 0
	if n, err := fmt.Sscan(args[0], &wrong); n == 1 && err == nil {
		args = args[1:]
	}
	cmd := exec.Command(binary, append([]string{"--config", h.path("config.yaml")}, args...)...)
	talk, err := start(cmd, terminal)
	if err != nil {
		return broken("%w", err)
	}
	shown, talkErr := h.converse(talk, wrong)
	err = cmd.Wait()
	fmt.Fprint(ts.Stdout(), shown)
	if talkErr != nil {
		return broken("%w: %s", talkErr, shown)
	}
	return err
}

// talk is a test's conversation with a process.
type talk struct {
	in  io.WriteCloser
	out io.Reader
	// listens returns once the terminal no longer echoes typed text.
	listens func() error
}

func start(cmd *exec.Cmd, terminal bool) (*talk, error) {
	if terminal {
		return startOnTerminal(cmd)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	cmd.Stdout, cmd.Stderr = w, w
	return &talk{in, out, func() error { return nil }}, cmd.Start()
}

func startOnTerminal(cmd *exec.Cmd) (*talk, error) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	fd := int(master.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, err
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, err
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer slave.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	quiet := func() error {
		return eventually(func() error {
			t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
			if err == nil && t.Lflag&unix.ECHO != 0 {
				err = errors.New("what is typed is shown")
			}
			return err
		})
	}
	return &talk{master, master, quiet}, cmd.Start()
}

var identityLine = regexp.MustCompile(`AGE-SECRET-KEY-[A-Z0-9-]+\s`)

// converse reads to the end, and types once the identity is shown: wrong lines, each
// after a prompt or a complaint, and then the identity, unless three lines were wrong.
func (h *host) converse(t *talk, wrong int) (shown string, err error) {
	var typed int
	buffer := make([]byte, 4096)
	for {
		n, readErr := t.out.Read(buffer)
		shown += string(buffer[:n])
		identity := strings.TrimSpace(identityLine.FindString(shown))
		refused := strings.Count(shown, "does not open the recovery slot")
		if err == nil && identity != "" && typed == refused && typed < founding.ReadBackTries {
			line := identity
			if typed < wrong {
				line = "AGE-SECRET-KEY-1WRONG"
			}
			if err = t.listens(); err == nil {
				_, err = io.WriteString(t.in, line+"\n")
			}
			typed++
			if e := os.WriteFile(h.path("shown.txt"), []byte(identity+"\n"), 0o600); err == nil {
				err = e
			}
		}
		if readErr != nil { // EOF, or EIO from a terminal whose process has ended
			return shown, err
		}
	}
}
