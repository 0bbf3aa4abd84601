package verifier

import (
	"net"
	"net/netip"
	"sync"
	"time"
)

// Limits. A node asks once when it starts, and a few times more while PCRs that
// it does not quote are being extended.
const (
	maxConnections     = 256 // of all peers
	maxPeerConnections = 16
	maxExchanges       = 16 // at the same time, of all peers; each may hold two logs
	maxPeerExchanges   = 4
	maxStreams         = 4  // at the same time, on one connection
	burst              = 20 // exchanges that a peer may begin at once
	refill             = 2 * time.Second
	maxPeers           = 4096 // that are remembered
)

// peers counts what each peer has: an IPv4 address, or the /64 of an IPv6 one.
type peers struct {
	mu          sync.Mutex
	now         func() time.Time
	known       map[netip.Prefix]*share
	connections int
	exchanges   int
}

type share struct {
	connections int
	exchanges   int
	begun       float64 // of burst, as of last
	last        time.Time
}

func newPeers() *peers { return &peers{now: time.Now, known: map[netip.Prefix]*share{}} }

// idle reports whether nothing would be forgotten with the share.
func (s *share) idle(now time.Time) bool {
	s.settle(now)
	return s.connections == 0 && s.exchanges == 0 && s.begun == 0
}

func (s *share) settle(now time.Time) {
	s.begun = max(0, s.begun-float64(now.Sub(s.last))/float64(refill))
	s.last = now
}

// of returns a peer's share, or nil where no more peers can be remembered.
func (p *peers) of(a net.Addr) *share {
	key := prefixOf(a)
	if s := p.known[key]; s != nil {
		return s
	}
	now := p.now()
	if len(p.known) >= maxPeers {
		for k, s := range p.known {
			if s.idle(now) {
				delete(p.known, k)
			}
		}
		if len(p.known) >= maxPeers {
			return nil
		}
	}
	s := &share{last: now}
	p.known[key] = s
	return s
}

func prefixOf(a net.Addr) netip.Prefix {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := t.AddrPort().Addr().Unmap()
	bits := 32
	if ip.Is6() {
		bits = 64
	}
	prefix, _ := ip.WithZone("").Prefix(bits)
	return prefix
}

// connect takes a connection's place, or reports that there is none.
func (p *peers) connect(a net.Addr) (leave func(), ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.of(a)
	if s == nil || s.connections == maxPeerConnections || p.connections == maxConnections {
		return nil, false
	}
	s.connections++
	p.connections++
	return sync.OnceFunc(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		s.connections--
		p.connections--
	}), true
}

// begin takes an exchange's place, or reports that there is none.
func (p *peers) begin(a net.Addr) (leave func(), ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.of(a)
	if s == nil || s.exchanges == maxPeerExchanges || p.exchanges == maxExchanges {
		return nil, false
	}
	s.settle(p.now())
	if s.begun+1 > burst {
		return nil, false
	}
	s.begun++
	s.exchanges++
	p.exchanges++
	return sync.OnceFunc(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		s.exchanges--
		p.exchanges--
	}), true
}

// listener closes connections that are too many.
type listener struct {
	net.Listener
	peers *peers
}

// Accept implements net.Listener.
func (l listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if leave, ok := l.peers.connect(c.RemoteAddr()); ok {
			return &conn{c, leave}, nil
		}
		_ = c.Close()
	}
}

type conn struct {
	net.Conn
	leave func()
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.leave()
	return c.Conn.Close()
}
