package unixsocket

import (
	"log/slog"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Peer is the process that connected, as the kernel recorded it at connect(2).
type Peer struct {
	UID, GID uint32
	PID      int32
}

// Conn is a connection whose peer is known.
type Conn struct {
	*net.UnixConn
	Peer Peer
	// Allowed says whether Peer.UID is in Config.AllowedUIDs. The server must refuse
	// the others, because only the server can tell them why.
	Allowed bool
	// Self says that the peer is this process, if Config.Self admits it.
	Self  bool
	leave func()
}

// Close closes the connection and makes room for another.
func (c *Conn) Close() error {
	c.leave()
	return c.UnixConn.Close()
}

func peerOf(c *net.UnixConn) (Peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var cred *unix.Ucred
	var serr error
	if err := raw.Control(func(fd uintptr) {
		cred, serr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return Peer{}, err
	}
	if serr != nil {
		return Peer{}, os.NewSyscallError("getsockopt SO_PEERCRED", serr)
	}
	return Peer{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid}, nil
}

// seats counts connections, with a separate count for strangers, so that strangers
// can't keep the allowed peers out.
type seats struct {
	allowed []uint32
	any     bool
	self    bool
	log     *slog.Logger
	mu      sync.Mutex
	free    map[bool]int // by allowed or not
	full    map[bool]bool
}

func (s *seats) init(allowed []uint32, anyPeer bool, log *slog.Logger) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s.allowed, s.any, s.log = slices.Clone(allowed), anyPeer, log
	s.free = map[bool]int{true: MaxConns, false: MaxStrangers}
	s.full = map[bool]bool{}
}

func (s *seats) take(c *net.UnixConn, p Peer) *Conn {
	if s.self && int(p.PID) == os.Getpid() {
		return &Conn{UnixConn: c, Peer: p, Allowed: true, Self: true, leave: func() {}}
	}
	ok := s.any || slices.Contains(s.allowed, p.UID)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.free[ok] == 0 {
		if !s.full[ok] { // log once each time the seats fill up
			s.log.Warn("too many connections, closing new ones", "uid", p.UID, "pid", p.PID, "allowed", ok)
		}
		s.full[ok] = true
		return nil
	}
	s.free[ok]--
	return &Conn{UnixConn: c, Peer: p, Allowed: ok, leave: sync.OnceFunc(func() { s.leave(ok) })}
}

func (s *seats) leave(ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.free[ok]++
	s.full[ok] = false
}

// defaultOverflowUID is the kernel's default of kernel.overflowuid.
const defaultOverflowUID = 65534

// OverflowUID is the UID that stands for every user whom a user namespace does not map,
// so it identifies nobody in particular.
func OverflowUID() uint32 {
	b, err := os.ReadFile("/proc/sys/kernel/overflowuid")
	if err != nil {
		return defaultOverflowUID
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 32)
	if err != nil {
		return defaultOverflowUID
	}
	return uint32(n)
}

// MaxConns bounds the connections of allowed peers.
const MaxConns = 256

// MaxStrangers bounds the connections of other peers, which stay open only to be
// told that they are refused.
const MaxStrangers = 16
