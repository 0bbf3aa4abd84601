package verifier

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	wire "github.com/beezy-dev/kleidi/grpcserver/internal/exchange"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
)

// hurried is a rig whose server gives peers little time.
func hurried(t *testing.T, hello, proof time.Duration) *rig {
	t.Helper()
	return newRig(t, func(o *Options) { o.hello, o.proof = hello, proof })
}

// TestSilentPeers: silence before the first message, before the proof and after it is
// cut off, each in its time, and leaves no place occupied.
func TestSilentPeers(t *testing.T) {
	const hello, proof, long = 3 * time.Second, 3 * time.Second, time.Minute
	r := hurried(t, hello, long)
	s := r.raw()
	if err := lastOf(s); status.Code(err) != codes.Unavailable && !strings.Contains(err.Error(), "no first message within 3s") {
		t.Errorf("no first message: %v", err)
	}
	c, err := net.Dial("tcp", r.address) // no stream at all, nor TLS
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.ReadAll(c); err != nil && !errors.Is(err, net.ErrClosed) && !strings.Contains(err.Error(), "reset") {
		t.Errorf("no TLS: %v", err)
	}
	r = hurried(t, long, proof)
	var first *FromAttester
	_ = r.ask(altered{Channel: r.client(), hello: func(h *remote.Hello) { first = fromHello(h) }}) // its proof may come too late
	s = r.raw()
	if err := s.Send(first); err != nil {
		t.Fatal(err)
	}
	if err := lastOf(s); status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "no proof within 3s") {
		t.Errorf("no proof: %v", err)
	}
	r = newRig(t, func(o *Options) { o.Timeout = 30 * time.Second })
	err = r.ask(odd{r, nil})
	if !strings.Contains(fmt.Sprint(err), "DeadlineExceeded") {
		t.Errorf("no logs: %v", err)
	}
	r.works("after silent ones")
	r.eventually("no place is taken", func() bool { return r.server.wire.Unproven() == 0 && r.server.wire.Proven() == 0 })
}

// silentFrom opens a connection from an address of loopback and says hello, or nothing.
func (r *rig) silentFrom(ip net.IP, hello bool) {
	r.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: ip}}
	c, err := d.DialContext(r.Context(), "tcp", r.address)
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { c.Close() })
	if hello {
		_ = tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}).HandshakeContext(r.Context())
	}
}

// TestSilentPeersKeepNobodyOut: peers that fill every place, each from a separate
// address, are disconnected for a node that comes last.
func TestSilentPeersKeepNobodyOut(t *testing.T) {
	r := hurried(t, time.Minute, time.Minute)
	for i := range wire.MaxUnproven + 40 {
		r.silentFrom(net.IPv4(127, 9, byte(i>>8), byte(i&0xff|1)), i%16 == 0)
	}
	r.eventually("all have been taken in", func() bool { return r.server.wire.Unproven() >= wire.MaxUnproven-1 })
	r.works("beside silent peers")
	for range 3 * wire.MaxPeerUnproven { // from the node's own address
		r.silentFrom(net.IPv4(127, 0, 0, 1), false)
	}
	r.works("beside silent peers of the same address")
	if n := r.server.wire.Unproven(); n > wire.MaxUnproven {
		t.Errorf("%d connections without a proof, at most %d wanted", n, wire.MaxUnproven)
	}
}

// TestGarbage: bytes that are not TLS do no harm.
func TestGarbage(t *testing.T) {
	r := newRig(t)
	c, err := net.Dial("tcp", r.address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("GET / HTTP/1.0\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	r.works("beside garbage")
}

// held is a channel that stops after the proof until the test lets it go on.
type held struct {
	*rig
	there chan<- struct{}
	goOn  <-chan struct{}
}

// Attest implements remote.Channel.
func (h held) Attest(ctx context.Context, hello *remote.Hello, answer func(*remote.Challenge, []byte) (*remote.Evidence, error)) ([]byte, error) {
	d := &dialogue{h.raw()}
	return d.run(hello, func(c *remote.Challenge, exporter []byte) (*remote.Evidence, error) {
		e, err := answer(c, exporter)
		if err != nil {
			return nil, err
		}
		first := *e
		first.FirmwareLog, first.UserspaceLog = nil, nil
		if err := d.send(fromEvidence(&first)); err != nil {
			return nil, err
		}
		h.there <- struct{}{}
		<-h.goOn
		if err := d.send(part(&LogPart{Firmware: e.FirmwareLog})); err != nil {
			return nil, err
		}
		if err := d.stream.CloseSend(); err != nil {
			return nil, err
		}
		m, err := d.receive()
		if err == nil && len(m.GetSignature().GetSignature()) == 0 {
			err = errors.New("no signature")
		}
		if err == nil {
			err = errors.New("signed")
		}
		return nil, err
	})
}

// TestPlacesOfANode: a place is reserved for each endorsement key, and no key takes
// another's.
func TestPlacesOfANode(t *testing.T) {
	r := newRig(t)
	ek := r.options.Verifier.Nodes["alpha"].EK
	var leave []func()
	for range wire.MaxNodePlaces {
		l, ok := r.server.wire.Take(ek)
		if !ok {
			t.Fatal("no place")
		}
		leave = append(leave, l)
	}
	r.refused("one too many", r.ask(r.client()), seal.CauseUnavailable, "too many exchanges with this node")
	if l, ok := r.server.wire.Take("sha256:another"); !ok {
		t.Error("another node has no place")
	} else {
		l()
	}
	leave[0]()
	leave[0]() // once is enough
	r.works("as soon as one has ended")
	// The server gives the place back after its last message.
	r.eventually("the exchange left its place", func() bool { _, ok := r.server.wire.Take(ek); return ok })
	if _, ok := r.server.wire.Take(ek); ok {
		t.Error("a place was given twice")
	}
}

// TestOneExchangePerConnection: a second stream is refused, so that the time of a
// connection is the time of one exchange.
func TestOneExchangePerConnection(t *testing.T) {
	r := newRig(t)
	first := r.raw()
	if err := first.CloseSend(); err != nil {
		t.Fatal(err)
	}
	_ = lastOf(first)
	second, err := r.again(first)
	if err != nil {
		t.Fatal(err)
	}
	if err := lastOf(second); status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "one exchange") {
		t.Error(err)
	}
}

// TestReplace: a new registration is valid at once, even for an exchange that has
// begun, and so is a new certificate.
func TestReplace(t *testing.T) {
	r := newRig(t)
	there, goOn, done := make(chan struct{}), make(chan struct{}), make(chan error)
	begin := func() {
		go func() { done <- r.ask(held{r, there, goOn}) }()
		<-there
	}
	begin()
	close(goOn)
	if err := <-done; !strings.HasSuffix(fmt.Sprint(err), "signed") {
		t.Fatalf("nothing was replaced: %v", err)
	}
	goOn = make(chan struct{})
	begin()
	without := *r.options.Verifier
	without.Nodes = map[string]remote.Registration{}
	r.server.Replace(&without, r.options.Certificate)
	close(goOn)
	if err := <-done; !strings.Contains(fmt.Sprint(err), errChanged.Error()) {
		t.Errorf("an exchange that had begun: %v", err)
	}
	r.refused("a node that was taken out", r.ask(r.client()), seal.CauseAttestation, "is not registered")
	other := certificate(t, "verifier.example", nil)
	r.server.Replace(r.options.Verifier, other)
	r.refused("the former certificate", r.ask(r.client()), seal.CauseUnavailable, "not the one that is configured")
	r.options.Certificate = other
	r.works("the new certificate")
}
