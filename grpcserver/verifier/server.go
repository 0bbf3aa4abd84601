package verifier

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/beezy-dev/kleidi/grpcserver/internal/panics"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
)

// DefaultTimeout bounds an exchange. A discrete TPM takes seconds for its part,
// most of all where it has to make the endorsement key anew.
const DefaultTimeout = time.Minute

// Bounds of a connection.
const (
	connectTimeout = 5 * time.Second // until a connection speaks HTTP/2
	maxHeaders     = 16 << 10        // bytes
	maxIdle        = 30 * time.Second
	maxAge         = 5 * time.Minute
	pingAfter      = 20 * time.Second
	pingWait       = 10 * time.Second
)

// Options are what a Server needs; Log and Timeout may be left out.
type Options struct {
	Verifier *remote.Verifier
	// Certificate is the server's own. Nodes know it by its digest, or by its CA.
	Certificate tls.Certificate
	// Record puts a verdict on record before the node learns of it. If it fails
	// the answer is no.
	Record  func(*Verdict) error
	Log     *slog.Logger
	Timeout time.Duration // of one exchange; 0 is DefaultTimeout
}

// Verdict is what came of one exchange.
type Verdict struct {
	Time     time.Time `json:"time"`
	Peer     string    `json:"peer"`
	Node     string    `json:"node"` // as claimed, until Accepted
	EK       string    `json:"ek"`   // as claimed, until Accepted
	Accepted bool      `json:"accepted"`
	// Check and Reason say what was found wanting, and Hint what to do next.
	Check  string `json:"check,omitempty"`
	Reason string `json:"reason,omitempty"`
	Hint   string `json:"hint,omitempty"`
	// Bank and PCRs are the quoted values, by index, of accepted evidence.
	Bank string         `json:"bank,omitempty"`
	PCRs map[int]string `json:"pcrs,omitempty"`
	// Session is the policy session's nonce, in hexadecimal, that was signed.
	Session string `json:"session,omitempty"`
}

// Server answers nodes.
type Server struct {
	Options
	grpc  *grpc.Server
	peers *peers
}

// NewServer makes a Server.
func NewServer(o Options) *Server {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	s := &Server{Options: o, peers: newPeers()}
	s.grpc = grpc.NewServer(
		grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{o.Certificate}, MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true})),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(connectTimeout),
		grpc.InTapHandle(s.limitTime),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: maxIdle, MaxConnectionAge: maxAge, MaxConnectionAgeGrace: o.Timeout, Time: pingAfter, Timeout: pingWait}),
	)
	s.grpc.RegisterService(&grpc.ServiceDesc{
		ServiceName: serviceName, Metadata: "verifier.proto",
		Streams: []grpc.StreamDesc{{StreamName: methodName, Handler: s.handle, ServerStreams: true, ClientStreams: true}},
	}, nil)
	return s
}

const (
	serviceName = "kleidi.verifier.v1.RemoteGate"
	methodName  = "Attest"
)

// Serve answers on l until it is stopped. Stopping is no error.
func (s *Server) Serve(l net.Listener) error { return s.grpc.Serve(listener{l, s.peers}) }

// GracefulStop closes the listener, lets exchanges in progress end, and cuts them
// off when ctx is done.
func (s *Server) GracefulStop(ctx context.Context) {
	stop := context.AfterFunc(ctx, s.grpc.Stop)
	defer stop()
	s.grpc.GracefulStop()
}

// limitTime bounds an exchange, whatever deadline its client named. It runs before
// anything of it is read.
func (s *Server) limitTime(ctx context.Context, _ *tap.Info) (context.Context, error) {
	limited, cancel := context.WithTimeout(ctx, s.Timeout)
	context.AfterFunc(ctx, cancel) // gRPC cancels ctx when the call ends
	return limited, nil
}

// Errors of the exchange itself. What the evidence lacks is a Refusal.
var (
	errPanic  = status.Error(codes.Internal, "internal error in kleidi verifier; see its log for the place, and report it")
	errBusy   = status.Error(codes.ResourceExhausted, "too many exchanges at a time; ask again later")
	errTLS    = status.Error(codes.Unauthenticated, "the connection is not TLS 1.3")
	errOrder  = status.Error(codes.InvalidArgument, "a message came out of its order; is the caller a kleidi of this version?")
	errRecord = status.Error(codes.Unavailable, "the verifier can't write its audit log, so the answer is no; see the log of kleidi verifier")
)

// handle is what every exchange passes through: its peer's share, the exchange
// itself; a panic becomes an error.
func (s *Server) handle(_ any, stream grpc.ServerStream) (err error) {
	defer func() {
		if v := recover(); v != nil {
			panics.Log(s.Log, methodName, v)
			err = errPanic
		}
	}()
	p, ok := peer.FromContext(stream.Context())
	if !ok {
		return errTLS
	}
	leave, ok := s.peers.begin(p.Addr)
	if !ok {
		return errBusy
	}
	defer leave()
	exporter, err := exporterOf(p)
	if err != nil {
		return err
	}
	x := &exchange{Server: s, stream: &grpc.GenericServerStream[FromAttester, FromVerifier]{ServerStream: stream}, peer: p.Addr.String()}
	err = x.run(exporter)
	var refusal *remote.Refusal
	if errors.As(err, &refusal) {
		return x.refuse(refusal)
	}
	if err != nil {
		s.Log.Debug("an exchange ended early", "peer", x.peer, "error", seal.OneLine(err.Error(), maxReason))
	}
	return err
}

func exporterOf(p *peer.Peer) ([]byte, error) {
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || info.State.Version != tls.VersionTLS13 {
		return nil, errTLS
	}
	return info.State.ExportKeyingMaterial(remote.ExporterLabel, nil, remote.ExporterSize)
}

// exchange is one stream.
type exchange struct {
	*Server
	stream grpc.BidiStreamingServer[FromAttester, FromVerifier]
	peer   string
	hello  *remote.Hello
}

func (x *exchange) run(exporter []byte) error {
	m, err := x.stream.Recv()
	if err != nil {
		return err
	}
	if m.GetHello() == nil {
		return errOrder
	}
	x.hello = toHello(m.GetHello())
	pending, challenge, err := x.Verifier.Challenge(x.hello, exporter)
	if err != nil {
		return err
	}
	if err := x.stream.Send(fromChallenge(challenge)); err != nil {
		return err
	}
	if m, err = x.stream.Recv(); err != nil {
		return err
	}
	if m.GetStatement() == nil {
		return errOrder
	}
	evidence := toEvidence(m.GetStatement())
	if err := pending.Prove(evidence.Proof); err != nil {
		return err
	}
	if err := x.readLogs(evidence); err != nil {
		return err
	}
	passed, err := pending.Judge(evidence)
	if err != nil {
		return err
	}
	return x.accept(passed)
}

// readLogs reads until the stream ends. Who sends them has proven which TPM it is.
func (x *exchange) readLogs(e *remote.Evidence) error {
	for {
		m, err := x.stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		part := m.GetLog()
		if part == nil {
			return errOrder
		}
		e.FirmwareLog = append(e.FirmwareLog, part.GetFirmware()...)
		e.UserspaceLog = append(e.UserspaceLog, part.GetUserspace()...)
		if len(e.FirmwareLog) > remote.MaxLog || len(e.UserspaceLog) > remote.MaxLog {
			return status.Errorf(codes.InvalidArgument, "an event log has more than %d MiB", remote.MaxLog>>20)
		}
	}
}

func (x *exchange) verdict() *Verdict {
	return &Verdict{Time: time.Now().UTC(), Peer: x.peer, Node: seal.OneLine(x.hello.Node, maxName), EK: remote.EKDigest(x.hello)}
}

func (x *exchange) accept(passed *remote.Passed) error {
	v := x.verdict()
	v.Accepted, v.Bank, v.PCRs = true, bankNames[passed.Result.Bank], map[int]string{}
	for i, value := range passed.Result.PCRs {
		v.PCRs[i] = hex.EncodeToString(value)
	}
	v.Session = hex.EncodeToString(x.hello.NonceTPM)
	if err := x.record(v); err != nil {
		return err
	}
	signature, err := passed.Sign()
	if err != nil {
		x.Log.Error("the verifier's key does not sign", "error", err)
		return status.Error(codes.Internal, "the verifier's key does not sign; see the log of kleidi verifier")
	}
	return x.stream.Send(&FromVerifier{Message: &FromVerifier_Signature{&Signature{Signature: signature}}})
}

func (x *exchange) refuse(r *remote.Refusal) error {
	v := x.verdict()
	v.Check, v.Reason, v.Hint = string(r.Check), seal.OneLine(r.Err.Error(), maxReason), seal.OneLine(r.Hint, maxHint)
	if err := x.record(v); err != nil {
		return err
	}
	return x.stream.Send(&FromVerifier{Message: &FromVerifier_Refusal{&Refusal{Check: v.Check, Reason: v.Reason, Hint: v.Hint}}})
}

// record writes a verdict to the audit log, then to the log.
func (x *exchange) record(v *Verdict) error {
	if err := x.Record(v); err != nil {
		x.Log.Error("the audit log can't be written, so the answer is no", "node", v.Node, "peer", v.Peer, "error", err)
		return errRecord
	}
	if v.Accepted {
		x.Log.Info("evidence accepted", "node", v.Node, "ek", v.EK, "peer", v.Peer)
		return nil
	}
	x.Log.Warn("evidence refused", "node", v.Node, "ek", v.EK, "peer", v.Peer, "check", v.Check, "reason", v.Reason, "hint", v.Hint)
	return nil
}
