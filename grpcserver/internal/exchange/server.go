package exchange

import (
	"cmp"
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/proto"

	"github.com/beezy-dev/kleidi/grpcserver/internal/panics"
	protocol "github.com/beezy-dev/kleidi/tpm/attest/exchange"
)

// DefaultTimeout bounds an exchange, including the logs.
const DefaultTimeout = time.Minute

// Bounds of a connection.
const (
	maxHeaders = 16 << 10 // bytes
	pingAfter  = 20 * time.Second
	pingWait   = 10 * time.Second
)

// Service describes the purpose of an exchange.
type Service struct {
	// Name and Method are gRPC's names, and File is the .proto file that describes
	// them.
	Name, Method, File string
	// Exporter is the label under which both sides export a value from the TLS
	// connection.
	Exporter string
	// Program names the answering program, for messages.
	Program string
}

// Options configure a Server. Timeout, Hello and Proof are optional.
type Options struct {
	Service
	// Certificate returns the server's present certificate.
	Certificate func() *tls.Certificate
	// Answer is one exchange. Its result ends the stream.
	Answer func(*Stream) error
	// Dropped receives the reason why a connection without a proof was closed.
	Dropped func(reason string)
	Log     *slog.Logger
	// Timeout bounds an exchange, Hello the time to its first message, and Proof the time
	// from the challenge to the proof.
	Timeout, Hello, Proof time.Duration
}

// Server answers peers.
type Server struct {
	options Options
	grpc    *grpc.Server
	crowd   *crowd
	places  places
}

// NewServer makes a Server.
func NewServer(o Options) *Server {
	o.Timeout, o.Hello, o.Proof = cmp.Or(o.Timeout, DefaultTimeout), cmp.Or(o.Hello, HelloTimeout), cmp.Or(o.Proof, ProofTimeout)
	s := &Server{options: o, crowd: newCrowd(o.Dropped, o.Hello)}
	tls := credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return o.Certificate(), nil }})
	s.grpc = grpc.NewServer(
		grpc.Creds(known{tls}),
		grpc.MaxRecvMsgSize(MaxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(1),
		grpc.ConnectionTimeout(o.Hello),
		grpc.InTapHandle(s.limitTime),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingAfter, Timeout: pingWait}),
	)
	s.grpc.RegisterService(&grpc.ServiceDesc{
		ServiceName: o.Name, Metadata: o.File,
		Streams: []grpc.StreamDesc{{StreamName: o.Method, Handler: s.handle, ServerStreams: true, ClientStreams: true}},
	}, nil)
	return s
}

// Serve answers on l until it is stopped. Stopping is not an error.
func (s *Server) Serve(l net.Listener) error { return s.grpc.Serve(listener{l, s.crowd}) }

// GracefulStop closes the listener, lets exchanges in progress end, and cuts them
// off when ctx is done.
func (s *Server) GracefulStop(ctx context.Context) {
	stop := context.AfterFunc(ctx, s.grpc.Stop)
	defer stop()
	s.grpc.GracefulStop()
}

// Unproven counts the connections whose peers have proven nothing.
func (s *Server) Unproven() int { return s.crowd.count() }

// Proven counts the exchanges whose peers have proven their TPMs.
func (s *Server) Proven() int { return s.places.count() }

// Take takes a place for a peer that has proven its endorsement key, or reports that
// there is none.
func (s *Server) Take(ek string) (leave func(), ok bool) { return s.places.take(ek) }

// limitTime bounds an exchange, whatever deadline its client set. It runs before
// anything is read.
func (s *Server) limitTime(ctx context.Context, _ *tap.Info) (context.Context, error) {
	limited, cancel := context.WithTimeout(ctx, s.options.Timeout)
	context.AfterFunc(ctx, cancel) // gRPC cancels ctx when the call ends
	return limited, nil
}

// Errors of the exchange itself. A fault of the evidence is a refusal.
var (
	ErrBusy   = status.Error(codes.ResourceExhausted, "too many exchanges with this node at once; try again later")
	ErrTLS    = status.Error(codes.Unauthenticated, "the connection is not TLS 1.3")
	errSecond = status.Error(codes.ResourceExhausted, "a connection carries only one exchange; connect again")
)

// known are TLS credentials that let a handler see its connection.
type known struct {
	credentials.TransportCredentials
}

// ServerHandshake implements credentials.TransportCredentials.
func (k known) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secured, info, err := k.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	c, ok := raw.(*conn)
	t, isTLS := info.(credentials.TLSInfo)
	if !ok || !isTLS {
		return nil, nil, ErrTLS
	}
	return secured, seen{t, c}, nil
}

// seen is the AuthInfo of known.
type seen struct {
	credentials.TLSInfo
	conn *conn
}

// handle wraps every exchange: it allows only one for each connection, and turns a
// panic into an error.
func (s *Server) handle(_ any, raw grpc.ServerStream) (err error) {
	p, ok := peer.FromContext(raw.Context())
	if !ok {
		return ErrTLS
	}
	info, ok := p.AuthInfo.(seen)
	if !ok {
		return ErrTLS
	}
	if info.conn.begun.Swap(true) {
		return errSecond
	}
	defer func() {
		if v := recover(); v != nil {
			panics.Log(s.options.Log, s.options.Method, v)
			err = status.Error(codes.Internal, "internal error in "+s.options.Program+"; see its log for the place, and report it")
		}
		info.conn.within(lingerTimeout)
	}()
	exporter, err := exporterOf(info.TLSInfo, s.options.Exporter)
	if err != nil {
		return err
	}
	return s.options.Answer(&Stream{ServerStream: raw, Peer: p.Addr.String(), From: info.conn.from, Exporter: exporter, server: s, conn: info.conn})
}

func exporterOf(info credentials.TLSInfo, label string) ([]byte, error) {
	if info.State.Version != tls.VersionTLS13 {
		return nil, ErrTLS
	}
	return info.State.ExportKeyingMaterial(label, nil, protocol.ExporterSize)
}

// Stream is one exchange, on the answering side.
type Stream struct {
	grpc.ServerStream
	Peer     string
	From     netip.Prefix
	Exporter []byte // the TLS connection's value

	server *Server
	conn   *conn
}

// First receives the first message.
func (s *Stream) First(m proto.Message) error {
	return s.Receive(m, s.server.options.Hello, "first message")
}

// Ask sends the challenge, and receives its answer.
func (s *Stream) Ask(challenge, answer proto.Message) error {
	s.conn.within(s.server.options.Proof + lingerTimeout) // Receive ends first, with a reason
	if err := s.SendMsg(challenge); err != nil {
		return err
	}
	return s.Receive(answer, s.server.options.Proof, "proof")
}

// Proved gives the peer, which has proven its TPM, the time of a whole exchange.
func (s *Stream) Proved() {
	s.server.crowd.proved(s.conn)
	s.conn.within(s.server.options.Timeout + lingerTimeout)
}

// Receive waits for a message, and no longer than d.
func (s *Stream) Receive(m proto.Message, d time.Duration, what string) error {
	c := make(chan error, 1)
	go func() { c <- s.RecvMsg(m) }() // ends with the exchange at the latest
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case err := <-c:
		return err
	case <-timer.C:
		return status.Errorf(codes.DeadlineExceeded, "no %s within %v", what, d)
	}
}
