package unixsocket

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"
)

// dialTimeout bounds the wait for a listener whose queue is full.
const dialTimeout = 5 * time.Second

// Dial connects to the socket at path and verifies who listens there before the
// caller can send a byte:
//  1. the folder is one that Listen would accept, so that root or this process's
//     user made the socket;
//  2. the listener's UID, which the kernel recorded at listen(2), is root's or this
//     process's own.
//
// server names who should listen, for the error. An error that wraps fs.ErrNotExist or
// ECONNREFUSED means that nobody listens.
func Dial(ctx context.Context, path, server string) (net.Conn, error) {
	if err := checkFolder(filepath.Dir(path)); err != nil {
		return nil, err
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	c, err := dialer.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if err := checkListener(c.(*net.UnixConn), path, server); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func checkListener(c *net.UnixConn, path, server string) error {
	p, err := peerOf(c)
	if err != nil {
		return err
	}
	if p.UID == 0 || int(p.UID) == os.Geteuid() {
		return nil
	}
	return fmt.Errorf("%s answers, but process %d of UID %d listens there instead of %s, and nothing was sent to it; stop that process, and find out how it came to listen there", path, p.PID, p.UID, server)
}
