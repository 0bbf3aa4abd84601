package exchange

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"
)

// fake is a connection from an address.
type fake struct {
	net.Conn
	from   string
	closed bool
}

// RemoteAddr implements net.Conn.
func (f *fake) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(f.from), 1))
}

// Close implements net.Conn.
func (f *fake) Close() error { f.closed = true; return nil }

// TestCrowd: which connection is closed for a new one.
func TestCrowd(t *testing.T) {
	w := newCrowd(func(string) {}, time.Minute)
	enter := func(format string, args ...any) *fake {
		f := &fake{from: fmt.Sprintf(format, args...)}
		w.enter(f)
		return f
	}
	var own []*fake
	for range MaxPeerUnproven {
		own = append(own, enter("192.0.2.1"))
	}
	enter("::ffff:192.0.2.1") // the same peer
	if !own[0].closed || own[1].closed {
		t.Error("a peer that has all it may have does not lose its own oldest connection")
	}
	for i := range MaxUnproven - MaxPeerUnproven {
		enter("10.0.%d.%d", i/256, i%256)
	}
	if w.size != MaxUnproven || own[1].closed {
		t.Errorf("%d connections; the oldest is closed: %v", w.size, own[1].closed)
	}
	enter("10.9.9.9")
	if !own[1].closed || w.size != MaxUnproven {
		t.Error("the peer with the most connections does not lose its oldest")
	}
	// Of many peers with one connection each, the oldest connection is closed, unless
	// its peer gave a proof.
	w = newCrowd(func(string) {}, time.Minute)
	proven := w.enter(&fake{from: "192.0.2.7"})
	w.proved(proven)
	again, third := enter("192.0.2.7"), (*fake)(nil)
	first := enter("2001:db8:0:1::1")
	for i := range MaxUnproven - 2 {
		enter("2001:db8:1:%x::1", i)
	}
	enter("2001:db8:2::1")
	if again.closed || !first.closed {
		t.Errorf("a peer that gave a proof before is sent away: %v, the oldest stranger: %v", again.closed, first.closed)
	}
	second := enter("192.0.2.7")
	third = enter("192.0.2.7")
	if enter("2001:db8:2:1::1"); !again.closed || second.closed || third.closed {
		t.Error("a peer that gave a proof keeps more than its share")
	}
	for i := range 3 * maxKnown {
		w.proved(w.enter(&fake{from: fmt.Sprintf("10.%d.%d.1", i/256, i%256)}))
	}
	if len(w.known) != maxKnown {
		t.Errorf("%d peers are remembered", len(w.known))
	}
}
