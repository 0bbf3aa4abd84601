package vault

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// gate is a path to a server that can be shut, slowed down, or broken off.
type gate struct {
	t       *testing.T
	url     string
	address string
	target  string

	mu       sync.Mutex
	listener net.Listener
	open_    []net.Conn
}

func newGate(t *testing.T, url string) *gate {
	t.Helper()
	g := &gate{t: t, target: strings.TrimPrefix(url, "https://"), address: reserve(t)}
	g.url = "https://" + g.address
	g.open()
	t.Cleanup(g.shut)
	return g
}

// reserve returns an address whose port stays the test's, even while nobody listens
// there: a bound socket that does not listen keeps others from the port.
func reserve(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	// Not SO_REUSEADDR: listeners of package net set it, and those that ask for any port could
	// get this one
	err = errors.Join(sharePort(fd), unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	name, nameErr := unix.Getsockname(fd)
	if err := errors.Join(err, nameErr); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", name.(*unix.SockaddrInet4).Port)
}

// sharePort allows sockets of the same user that ask for it too to have the port.
func sharePort(fd int) error {
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
}

// open lets all connections through.
func (g *gate) open() { g.listen(g.forward) }

// stall accepts connections and answers none.
func (g *gate) stall() { g.listen(func(net.Conn) {}) }

// breakOff ends each connection after its first bytes.
func (g *gate) breakOff() {
	g.listen(func(c net.Conn) {
		_, _ = c.Read(make([]byte, 1))
		c.Close()
	})
}

// shut refuses connections, and ends the present ones.
func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.listener != nil {
		g.listener.Close()
		g.listener = nil
	}
	for _, c := range g.open_ {
		c.Close()
	}
	g.open_ = nil
}

func (g *gate) listen(serve func(net.Conn)) {
	g.t.Helper()
	g.shut()
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var shared error
		err := c.Control(func(fd uintptr) { shared = sharePort(int(fd)) })
		return errors.Join(err, shared)
	}}
	l, err := config.Listen(g.t.Context(), "tcp", g.address)
	if err != nil {
		g.t.Fatal(err)
	}
	g.mu.Lock()
	g.listener = l
	g.mu.Unlock()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			g.mu.Lock()
			current := g.listener == l
			if current {
				g.open_ = append(g.open_, c)
			}
			g.mu.Unlock()
			if !current { // shut meanwhile
				c.Close()
				return
			}
			go serve(c)
		}
	}()
}

func (g *gate) forward(c net.Conn) {
	defer c.Close()
	to, err := net.Dial("tcp", g.target)
	if err != nil {
		return
	}
	defer to.Close()
	go func() {
		_, _ = io.Copy(to, c)
		to.Close()
	}()
	_, _ = io.Copy(c, to)
}

// wasAsked returns nil once a connection is open.
func (g *gate) wasAsked() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.open_) == 0 {
		return errors.New("no connection")
	}
	return nil
}
