package admin

import (
	"net"
	"sync"

	"github.com/beezy-dev/kleidi/grpcserver/internal/unixsocket"
)

// conn records the buffers in which net/http put the peer's bytes. These buffers
// outlive the request, and a request may hold the recovery identity.
type conn struct {
	*unixsocket.Conn

	mu   sync.Mutex
	into [][]byte
}

// Read implements net.Conn.
func (c *conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if len(b) > 1 { // net/http waits for the peer's end with a buffer of one byte
		c.mu.Lock()
		defer c.mu.Unlock()
		c.into = append(c.into, b[:n])
	}
	return n, err
}

// wipe clears the recorded buffers. The request has been read by then. wipe would also
// clear a request sent right behind it, so the connection must be closed.
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
