package admin

import (
	"net"
	"sync"

	"github.com/beezy-dev/kleidi/grpcserver/internal/unixsocket"
)

// conn remembers where net/http had bytes of the peer put, since its buffers
// outlive the request, and a request may hold the recovery identity.
type conn struct {
	*unixsocket.Conn

	mu   sync.Mutex
	into [][]byte
}

// Read implements net.Conn.
func (c *conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if len(b) > 1 { // net/http waits for the peer to go away with one byte of its own
		c.mu.Lock()
		defer c.mu.Unlock()
		c.into = append(c.into, b[:n])
	}
	return n, err
}

// wipe clears what was read. The request has been read by then; one that was
// sent right behind it would be cleared too, so the connection must be closed.
func (c *conn) wipe() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range c.into {
		clear(b)
	}
	c.into = nil
}

// listener accepts conns.
type listener struct{ net.Listener }

// Accept implements net.Listener.
func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if known, ok := c.(*unixsocket.Conn); ok {
		return &conn{Conn: known}, err
	}
	return c, err
}
