// Package monitor serves health and metrics to the monitoring of this machine, and
// limits the harm that such connections can do.
//
// The listeners authenticate nobody, and the served data is not secret. The rest of the
// process needs protection: there are few connections, each carries one request and has
// seconds for it. So no number of connections takes memory or file descriptors that the
// KMS and admin sockets need. A new connection closes the oldest one; an honest client
// has its answer within milliseconds.
//
// The mode of the unix socket says who may connect: by default, only root and this
// process's own user. A loopback port admits every local user. Each user can take the
// port before this process does, and then answer "ok" for a kleidi that is locked. Each
// user can also crowd the others out.
package monitor

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"log"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/internal/unixsocket"
)

// MaxConns bounds the connections of each listener.
const MaxConns = 16

// Limits of a request, which has no body.
const (
	headerTimeout = 2 * time.Second
	readTimeout   = 2 * time.Second
	writeTimeout  = 5 * time.Second
	maxHeaders    = 8 << 10 // bytes
)

// Server serves on any number of listeners.
type Server struct{ http *http.Server }

// New makes a Server.
func New(h http.Handler) *Server {
	s := &Server{&http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		MaxHeaderBytes:    maxHeaders,
		ErrorLog:          log.New(io.Discard, "", 0), // a peer could cause any number of lines
	}}
	s.http.SetKeepAlivesEnabled(false)
	return s
}

// SocketConfig says where the unix socket is and who may use it.
type SocketConfig struct {
	Path string
	// Mode holds the permission bits; 0 means 0600.
	Mode fs.FileMode
	// GID is the socket's group; -1 means the process's own group.
	GID int
	Log *slog.Logger
}

// ListenSocket makes the socket. The rules of grpcserver.Listen apply to the folder and
// to an existing socket. Only the mode limits who may connect.
func ListenSocket(c SocketConfig) (net.Listener, error) {
	if c.Mode == 0 {
		c.Mode = 0o600
	}
	l, err := unixsocket.Listen(unixsocket.Config{
		Path: c.Path, Setting: "http.socket", Mode: c.Mode, Owner: &unixsocket.Owner{UID: -1, GID: c.GID}, AnyPeer: true, Log: c.Log,
	})
	if err != nil {
		return nil, err // not a typed nil
	}
	return limit(l), nil
}

// ListenTCP listens on an address, which package config has checked to be a loopback
// address.
func ListenTCP(address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	return limit(l), nil
}

// Serve answers on a listener of this package until Shutdown. Stopping is not an error.
func (s *Server) Serve(l net.Listener) error {
	if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Shutdown closes the listeners and waits for requests in progress, or for ctx.
func (s *Server) Shutdown(ctx context.Context) error {
	if err := s.http.Shutdown(ctx); err != nil {
		return errors.Join(err, s.http.Close())
	}
	return nil
}

// limited holds at most MaxConns connections, and closes the oldest one for a new one.
type limited struct {
	net.Listener
	mu   sync.Mutex
	open []*conn // the oldest first
}

func limit(l net.Listener) *limited { return &limited{Listener: l} }

// Accept implements net.Listener.
func (l *limited) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &conn{raw, l}
	l.mu.Lock()
	var oldest *conn
	if len(l.open) == MaxConns {
		oldest = l.open[0]
		l.open = l.open[1:]
	}
	l.open = append(l.open, c)
	l.mu.Unlock()
	if oldest != nil {
		_ = oldest.Conn.Close()
	}
	return c, nil
}

type conn struct {
	net.Conn
	l *limited
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.l.mu.Lock()
	c.l.open = slices.DeleteFunc(c.l.open, func(o *conn) bool { return o == c })
	c.l.mu.Unlock()
	return c.Conn.Close()
}
