package exchange

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Anybody may connect, and a connection proves nothing. So a connection without a proof
// has little value: it has seconds to send something, and if there are too many it is
// closed to make room for the next. A node proves its TPM within a second or a few, and
// then has a place that nobody else can take.

// Limits on connections without a proof.
const (
	MaxUnproven     = 256 // of all peers
	MaxPeerUnproven = 16  // of one peer: an IPv4 address, or the /64 of an IPv6 address
	// keptUnproven is the number of connections that are never closed for another peer,
	// if their own peer gave a proof before.
	keptUnproven = 2
	maxKnown     = 1024 // remembered peers that gave a proof
)

// Time limits.
const (
	// HelloTimeout bounds the time from the start of a connection to its first message.
	HelloTimeout = 3 * time.Second
	// ProofTimeout bounds the time from the challenge to the proof. A discrete TPM
	// needs seconds for it; the keys are made before the node connects.
	ProofTimeout = 15 * time.Second
	// lingerTimeout bounds the sending of the last message after the end of an
	// exchange.
	lingerTimeout = 2 * time.Second
)

// crowd holds the connections whose peers have proven nothing.
type crowd struct {
	dropped func(reason string)
	hello   time.Duration // bounds the time until the first message

	mu       sync.Mutex
	unproven map[netip.Prefix][]*conn // the oldest first
	size     int
	known    []netip.Prefix // peers that gave a proof, the last one first
}

func newCrowd(dropped func(reason string), hello time.Duration) *crowd {
	return &crowd{dropped: dropped, hello: hello, unproven: map[netip.Prefix][]*conn{}}
}

// conn is a connection. It carries one exchange.
type conn struct {
	net.Conn
	crowd *crowd
	from  netip.Prefix
	timer *time.Timer // closes the connection
	begun atomic.Bool // the connection's exchange has begun
	gone  atomic.Bool
	since time.Time
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.gone.Store(true)
	c.crowd.leave(c) // before the timer stops: enter sets the timer under the same lock
	c.timer.Stop()
	return c.Conn.Close()
}

// within bounds the time until the peer's next message.
func (c *conn) within(d time.Duration) {
	if !c.gone.Load() {
		c.timer.Reset(d)
	}
}

// expire closes a connection whose time is over.
func (c *conn) expire() {
	if !c.gone.Load() && !c.begun.Load() {
		c.crowd.dropped("silent") // the connection began no exchange
	}
	_ = c.Close()
}

// enter accepts a connection. If there are too many, it closes another one: the peer's
// own oldest, or else the oldest of the peer with the most connections.
func (w *crowd) enter(raw net.Conn) *conn {
	c := &conn{Conn: raw, crowd: w, from: prefixOf(raw.RemoteAddr()), since: time.Now()}
	w.mu.Lock()
	c.timer = time.AfterFunc(w.hello, c.expire)
	victim := w.victim(c.from)
	if victim != nil {
		w.remove(victim)
	}
	w.unproven[c.from] = append(w.unproven[c.from], c)
	w.size++
	w.mu.Unlock()
	if victim != nil {
		w.dropped("crowded")
		_ = victim.Close()
	}
	return c
}

// victim returns the connection to close before a peer gets one more, or nil.
func (w *crowd) victim(from netip.Prefix) *conn {
	if own := w.unproven[from]; len(own) >= MaxPeerUnproven {
		return own[0]
	}
	if w.size < MaxUnproven {
		return nil
	}
	var victim *conn
	most := 0
	for peer, all := range w.unproven {
		if slices.Contains(w.known, peer) {
			all = all[:max(0, len(all)-keptUnproven)]
		}
		if len(all) > most || len(all) == most && most > 0 && all[0].since.Before(victim.since) {
			victim, most = all[0], len(all)
		}
	}
	return victim
}

// remove removes a connection, if it is in the crowd.
func (w *crowd) remove(c *conn) {
	all := w.unproven[c.from]
	i := slices.Index(all, c)
	if i < 0 {
		return
	}
	w.size--
	if all = slices.Delete(all, i, i+1); len(all) == 0 {
		delete(w.unproven, c.from)
		return
	}
	w.unproven[c.from] = all
}

func (w *crowd) leave(c *conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.remove(c)
}

// proved removes a connection from the crowd, because its peer has proven its TPM, and
// remembers the peer.
func (w *crowd) proved(c *conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.remove(c)
	w.known = slices.DeleteFunc(w.known, func(p netip.Prefix) bool { return p == c.from })
	w.known = slices.Insert(w.known, 0, c.from)
	w.known = w.known[:min(len(w.known), maxKnown)]
}

func (w *crowd) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.size
}

// prefixOf returns the peer that an address belongs to.
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

// listener accepts connections into the crowd.
type listener struct {
	net.Listener
	crowd *crowd
}

// Accept implements net.Listener.
func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.crowd.enter(c), nil
}

// MaxNodePlaces bounds the simultaneous exchanges of a node that has proven its TPM.
// Each may hold two logs. There are two places because a node that gave up on an
// exchange may ask again before the verifier notices.
const MaxNodePlaces = 2

// places are reserved for each registered endorsement key: only the TPM with that key
// can take one.
type places struct {
	mu   sync.Mutex
	held map[string]int // by endorsement key
}

// take takes a place, or reports that there is none.
func (p *places) take(ek string) (leave func(), ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held[ek] == MaxNodePlaces {
		return nil, false
	}
	if p.held == nil {
		p.held = map[string]int{}
	}
	p.held[ek]++
	return sync.OnceFunc(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.held[ek]--; p.held[ek] == 0 {
			delete(p.held, ek)
		}
	}), true
}

func (p *places) count() (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, held := range p.held {
		n += held
	}
	return n
}
