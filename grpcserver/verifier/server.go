package verifier

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
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

// DefaultTimeout bounds an exchange, the logs included.
const DefaultTimeout = time.Minute

// Bounds of a connection.
const (
	maxHeaders = 16 << 10 // bytes
	pingAfter  = 20 * time.Second
	pingWait   = 10 * time.Second
)

// Options are what a Server needs; Log, Registerer and Timeout may be left out.
type Options struct {
	Verifier *remote.Verifier
	// Certificate is the server's own. Nodes know it by its digest, or by its CA.
	Certificate tls.Certificate
	// Record puts verdicts on record, before the node learns of one. If it fails the
	// answer is no. Refusals before a proof are summed up, and recorded later.
	Record func(...*Verdict) error
	// Registerer takes the metrics kleidi_verifier_….
	Registerer prometheus.Registerer
	Log        *slog.Logger
	Timeout    time.Duration // of one exchange; 0 is DefaultTimeout

	hello, proof time.Duration // helloTimeout and proofTimeout, if 0
}

// Verdict is what came of one exchange, or of several that were refused for the same
// reason before the peer had proven anything.
type Verdict struct {
	Time time.Time `json:"time"`
	// Since is the time of the first of Count refusals, and Time that of the last.
	Since    time.Time `json:"since,omitzero"`
	Count    int       `json:"count,omitempty"`
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
	record  func(...*Verdict) error
	log     *slog.Logger
	timeout time.Duration
	current atomic.Pointer[identity]
	grpc    *grpc.Server
	metrics *metrics
	crowd   *crowd
	places  places
	tally   tally
	proof   time.Duration
}

// identity is what Replace replaces.
type identity struct {
	verifier    *remote.Verifier
	certificate tls.Certificate
}

// NewServer makes a Server. It fails only where the metrics can't be registered.
func NewServer(o Options) (*Server, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{record: o.Record, log: o.Log, metrics: newMetrics(),
		timeout: cmp.Or(o.Timeout, DefaultTimeout), proof: cmp.Or(o.proof, proofTimeout)}
	s.crowd = newCrowd(s.metrics, cmp.Or(o.hello, helloTimeout))
	s.tally.write = func(sums []*Verdict) error { return s.audit(sums...) }
	s.Replace(o.Verifier, o.Certificate)
	if err := s.register(o.Registerer); err != nil {
		return nil, fmt.Errorf("register the verifier's metrics: %w", err)
	}
	tls := credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &s.current.Load().certificate, nil }})
	s.grpc = grpc.NewServer(
		grpc.Creds(known{tls}),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(1),
		grpc.ConnectionTimeout(helloTimeout),
		grpc.InTapHandle(s.limitTime),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingAfter, Timeout: pingWait}),
	)
	s.grpc.RegisterService(&grpc.ServiceDesc{
		ServiceName: serviceName, Metadata: "verifier.proto",
		Streams: []grpc.StreamDesc{{StreamName: methodName, Handler: s.handle, ServerStreams: true, ClientStreams: true}},
	}, nil)
	return s, nil
}

const (
	serviceName = "kleidi.verifier.v1.RemoteGate"
	methodName  = "Attest"
)

// Replace makes a verifier and a certificate count from now on. An exchange that began
// under the former verifier is not signed any more: the node may have been taken out.
func (s *Server) Replace(v *remote.Verifier, certificate tls.Certificate) {
	s.current.Store(&identity{v, certificate})
}

// Serve answers on l until it is stopped. Stopping is no error.
func (s *Server) Serve(l net.Listener) error { return s.grpc.Serve(listener{l, s.crowd}) }

// GracefulStop closes the listener, lets exchanges in progress end, and cuts them
// off when ctx is done. What was summed up is recorded.
func (s *Server) GracefulStop(ctx context.Context) {
	stop := context.AfterFunc(ctx, s.grpc.Stop)
	defer stop()
	s.grpc.GracefulStop()
	s.tally.flush()
}

// limitTime bounds an exchange, whatever deadline its client named. It runs before
// anything of it is read.
func (s *Server) limitTime(ctx context.Context, _ *tap.Info) (context.Context, error) {
	limited, cancel := context.WithTimeout(ctx, s.timeout)
	context.AfterFunc(ctx, cancel) // gRPC cancels ctx when the call ends
	return limited, nil
}

// Errors of the exchange itself. What the evidence lacks is a Refusal.
var (
	errPanic   = status.Error(codes.Internal, "internal error in kleidi verifier; see its log for the place, and report it")
	errBusy    = status.Error(codes.ResourceExhausted, "too many exchanges of this node at a time; ask again later")
	errTLS     = status.Error(codes.Unauthenticated, "the connection is not TLS 1.3")
	errSecond  = status.Error(codes.ResourceExhausted, "a connection carries one exchange; connect again")
	errOrder   = status.Error(codes.InvalidArgument, "a message came out of its order; is the caller a kleidi of this version?")
	errChanged = status.Error(codes.Unavailable, "the verifier's configuration was read anew meanwhile; ask again")
	errRecord  = status.Error(codes.Unavailable, "the verifier can't write its audit log, so the answer is no; see the log of kleidi verifier")
	errSign    = status.Error(codes.Internal, "the verifier's key does not sign; see the log of kleidi verifier")
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
		return nil, nil, errTLS
	}
	return secured, seen{t, c}, nil
}

// seen is the AuthInfo of known.
type seen struct {
	credentials.TLSInfo
	conn *conn
}

// handle is what every exchange passes through: it is the only one of its connection; a
// panic becomes an error; how it ends is counted.
func (s *Server) handle(_ any, stream grpc.ServerStream) (err error) {
	p, ok := peer.FromContext(stream.Context())
	if !ok {
		return errTLS
	}
	info, ok := p.AuthInfo.(seen)
	if !ok {
		return errTLS
	}
	if info.conn.begun.Swap(true) {
		return errSecond
	}
	x := &exchange{Server: s, stream: &grpc.GenericServerStream[FromAttester, FromVerifier]{ServerStream: stream},
		conn: info.conn, verifier: s.current.Load().verifier, peer: p.Addr.String(), outcome: outcomeEnded}
	defer func() {
		if v := recover(); v != nil {
			panics.Log(s.log, methodName, v)
			x.outcome, err = outcomeFailed, errPanic
		}
		s.metrics.ended(x.outcome)
		info.conn.within(lingerTimeout)
	}()
	return x.answer(info.TLSInfo)
}

// exchange is one stream.
type exchange struct {
	*Server
	stream   grpc.BidiStreamingServer[FromAttester, FromVerifier]
	conn     *conn
	verifier *remote.Verifier
	peer     string
	hello    *remote.Hello
	proven   bool
	outcome  outcome
}

func (x *exchange) answer(info credentials.TLSInfo) error {
	exporter, err := exporterOf(info)
	if err != nil {
		return err
	}
	err = x.run(exporter)
	if refusal, ok := errors.AsType[*remote.Refusal](err); ok {
		return x.refuse(refusal)
	}
	if err != nil {
		x.log.Debug("an exchange ended early", "peer", x.peer, "error", seal.OneLine(err.Error(), maxReason))
	}
	return err
}

func exporterOf(info credentials.TLSInfo) ([]byte, error) {
	if info.State.Version != tls.VersionTLS13 {
		return nil, errTLS
	}
	return info.State.ExportKeyingMaterial(remote.ExporterLabel, nil, remote.ExporterSize)
}

// run takes the node through the exchange. Up to the proof it costs the verifier two
// short messages and a place in the crowd; from there on the node has a place of its own.
func (x *exchange) run(exporter []byte) error {
	pending, err := x.challenge(exporter)
	if err != nil {
		return err
	}
	evidence, err := x.prove(pending)
	if err != nil {
		return err
	}
	leave, ok := x.places.take(pending.EK())
	if !ok {
		x.outcome = outcomeBusy
		return errBusy
	}
	defer leave()
	if err := x.readLogs(evidence); err != nil {
		return err
	}
	passed, err := pending.Judge(evidence)
	if err != nil {
		return err
	}
	return x.accept(passed)
}

func (x *exchange) challenge(exporter []byte) (*remote.Pending, error) {
	m, err := x.receive(x.crowd.hello, "first message")
	if err != nil {
		return nil, err
	}
	if m.GetHello() == nil {
		return nil, errOrder
	}
	x.hello = toHello(m.GetHello())
	pending, challenge, err := x.verifier.Challenge(x.hello, exporter)
	if err != nil {
		return nil, err
	}
	x.conn.within(x.proof + lingerTimeout) // receive comes first, and says why
	return pending, x.stream.Send(fromChallenge(challenge))
}

func (x *exchange) prove(pending *remote.Pending) (*remote.Evidence, error) {
	m, err := x.receive(x.proof, "proof")
	if err != nil {
		return nil, err
	}
	if m.GetStatement() == nil {
		return nil, errOrder
	}
	evidence := toEvidence(m.GetStatement())
	if err := pending.Prove(evidence.Proof); err != nil {
		return nil, err
	}
	x.proven = true
	x.crowd.proved(x.conn)
	x.conn.within(x.timeout + lingerTimeout)
	return evidence, nil
}

// receive waits for a message, and no longer than d.
func (x *exchange) receive(d time.Duration, what string) (*FromAttester, error) {
	type received struct {
		m   *FromAttester
		err error
	}
	c := make(chan received, 1)
	go func() {
		m, err := x.stream.Recv() // ends with the exchange at the latest
		c <- received{m, err}
	}()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case r := <-c:
		return r.m, r.err
	case <-timer.C:
		return nil, status.Errorf(codes.DeadlineExceeded, "no %s within %v", what, d)
	}
}

// readLogs reads until the stream ends. The sender has proven which TPM it is.
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
	if x.current.Load().verifier != x.verifier {
		return errChanged
	}
	v := x.verdict()
	v.Accepted, v.Bank, v.PCRs = true, bankNames[passed.Result.Bank], map[int]string{}
	for i, value := range passed.Result.PCRs {
		v.PCRs[i] = hex.EncodeToString(value)
	}
	v.Session = hex.EncodeToString(x.hello.NonceTPM)
	x.outcome = outcomeFailed
	if x.audit(v) != nil {
		return errRecord
	}
	signature, err := passed.Sign()
	if err != nil {
		x.log.Error("the verifier's key does not sign", "error", err)
		return errSign
	}
	x.log.Info("evidence accepted", "node", v.Node, "ek", v.EK, "peer", v.Peer)
	x.metrics.accepted.WithLabelValues(v.Node).Set(float64(v.Time.Unix()))
	x.outcome = outcomeAccepted
	return x.stream.Send(&FromVerifier{Message: &FromVerifier_Signature{&Signature{Signature: signature}}})
}

func (x *exchange) refuse(r *remote.Refusal) error {
	v := x.verdict()
	v.Check, v.Reason, v.Hint = string(r.Check), seal.OneLine(r.Err.Error(), maxReason), seal.OneLine(r.Hint, maxHint)
	x.metrics.refusals.WithLabelValues(v.Check).Inc()
	sent := &Refusal{Check: v.Check, Reason: v.Reason, Hint: v.Hint}
	first := true
	if x.proven {
		x.outcome = outcomeFailed
		if x.audit(v) != nil {
			return errRecord
		}
		x.outcome = outcomeRefused
	} else {
		x.outcome = outcomeUnproven
		first = x.tally.add(x.kind(v), v)
	}
	if first {
		x.log.Warn("evidence refused", "node", v.Node, "ek", v.EK, "peer", x.peer, "check", sent.Check, "reason", sent.Reason, "hint", sent.Hint)
	}
	return x.stream.Send(&FromVerifier{Message: &FromVerifier_Refusal{sent}})
}

func (x *exchange) kind(v *Verdict) kind {
	k := kind{check: v.Check, from: x.conn.from}
	if _, ok := x.verifier.Nodes[x.hello.Node]; ok {
		k.node = x.hello.Node
	}
	return k
}

// audit writes verdicts to the audit log.
func (s *Server) audit(verdicts ...*Verdict) error {
	err := s.record(verdicts...)
	if err != nil {
		s.metrics.audit.Inc()
		s.log.Error("the audit log can't be written, so the answer is no", "node", verdicts[0].Node, "peer", verdicts[0].Peer, "error", err)
	}
	return err
}
