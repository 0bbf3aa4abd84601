package verifier

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	wire "github.com/beezy-dev/kleidi/grpcserver/internal/exchange"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
)

// DefaultTimeout bounds an exchange, including the logs.
const DefaultTimeout = wire.DefaultTimeout

// Options configure a Server; Log, Registerer and Timeout are optional.
type Options struct {
	Verifier *remote.Verifier
	// Certificate is the server's own certificate. Nodes recognise it by its digest, or
	// by its CA.
	Certificate tls.Certificate
	// Record records verdicts before the node learns of them. If it fails, the answer
	// is no. Refusals before a proof are counted and recorded later.
	Record func(...*Verdict) error
	// Registerer takes the metrics kleidi_verifier_….
	Registerer prometheus.Registerer
	Log        *slog.Logger
	Timeout    time.Duration // of one exchange; 0 is DefaultTimeout

	hello, proof time.Duration // exchange.HelloTimeout and exchange.ProofTimeout, if 0
}

// Verdict is the result of one exchange, or of several that were refused for the same
// reason before the peer had proven anything.
type Verdict = wire.Verdict

// Server answers nodes.
type Server struct {
	record  func(...*Verdict) error
	log     *slog.Logger
	current atomic.Pointer[identity]
	wire    *wire.Server
	metrics *metrics
	tally   wire.Tally
	recent  remote.Recent
}

// identity holds what Replace replaces.
type identity struct {
	verifier    *remote.Verifier
	certificate tls.Certificate
}

// NewServer makes a Server. It fails only if the metrics can't be registered.
func NewServer(o Options) (*Server, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{record: o.Record, log: o.Log, metrics: newMetrics()}
	s.tally.Write = func(sums []*Verdict) error { return s.audit(sums...) }
	s.Replace(o.Verifier, o.Certificate)
	s.wire = wire.NewServer(wire.Options{Service: service, Certificate: func() *tls.Certificate { return &s.current.Load().certificate }, Answer: s.answer,
		Dropped: s.metrics.dropped, Log: o.Log, Timeout: o.Timeout, Hello: o.hello, Proof: o.proof})
	if err := s.register(o.Registerer); err != nil {
		return nil, fmt.Errorf("register the verifier's metrics: %w", err)
	}
	return s, nil
}

const (
	serviceName = "kleidi.verifier.v1.RemoteGate"
	methodName  = "Attest"
)

var service = wire.Service{Name: serviceName, Method: methodName, File: "verifier.proto", Exporter: remote.ExporterLabel, Program: "kleidi verifier"}

// Replace replaces the verifier and the certificate. The server no longer signs for an
// exchange that began under the former verifier, because the node may have been
// removed.
func (s *Server) Replace(v *remote.Verifier, certificate tls.Certificate) {
	s.current.Store(&identity{v, certificate})
}

// Serve answers on l until it is stopped. Stopping is not an error.
func (s *Server) Serve(l net.Listener) error { return s.wire.Serve(l) }

// GracefulStop closes the listener, lets exchanges in progress end, and cuts them off
// when ctx is done. It records the refusals counted so far.
func (s *Server) GracefulStop(ctx context.Context) {
	s.wire.GracefulStop(ctx)
	s.tally.Flush()
}

// Errors of the exchange itself. A fault of the evidence is a Refusal.
var (
	errChanged = status.Error(codes.Unavailable, "the verifier has reloaded its configuration; ask again")
	errRecord  = status.Error(codes.Unavailable, "the verifier can't write its audit log, so the answer is no; see the log of kleidi verifier")
	errSign    = status.Error(codes.Internal, "the verifier's key does not sign; see the log of kleidi verifier")
)

// session is one exchange, on the verifier's side.
type session struct {
	*Server
	*wire.Stream
	verifier *remote.Verifier
	hello    *remote.Hello
	proven   bool
	// finding is for the verifier's log and audit log alone.
	finding remote.Finding
	outcome outcome
}

// answer is one exchange. A panic counts as a failed exchange.
func (s *Server) answer(stream *wire.Stream) error {
	x := &session{Server: s, Stream: stream, verifier: s.current.Load().verifier}
	defer func() { s.metrics.ended(cmp.Or(x.outcome, outcomeFailed)) }()
	err := x.run()
	if refusal, ok := errors.AsType[*remote.Refusal](err); ok {
		return x.refuse(refusal)
	}
	if err != nil {
		x.outcome = cmp.Or(x.outcome, outcomeEnded)
		x.log.Debug("an exchange ended early", "peer", x.Peer, "error", seal.OneLine(err.Error(), maxReason))
	}
	return err
}

// run takes the node through the exchange. Until the proof, the node costs the verifier
// two short messages and a place in the crowd. Afterwards the node has its own place.
func (x *session) run() error {
	pending, challenge, err := x.challenge()
	if err != nil {
		return err
	}
	x.recent.Add(pending.Pending)
	evidence, err := x.prove(pending, challenge)
	if err != nil {
		return err
	}
	leave, ok := x.wire.Take(pending.EK())
	if !ok {
		x.outcome = outcomeBusy
		return wire.ErrBusy
	}
	defer leave()
	if err := wire.ReadLogs(evidence, x.nextLog); err != nil {
		return err
	}
	passed, err := pending.Judge(evidence)
	if err != nil {
		return err
	}
	return x.accept(passed)
}

func (x *session) challenge() (*remote.Pending, *remote.Challenge, error) {
	m := new(FromAttester)
	if err := x.First(m); err != nil {
		return nil, nil, err
	}
	if m.GetHello() == nil {
		return nil, nil, wire.ErrOrder
	}
	x.hello = toHello(m.GetHello())
	return x.verifier.Challenge(x.hello, x.Exporter)
}

func (x *session) prove(pending *remote.Pending, challenge *remote.Challenge) (*remote.Evidence, error) {
	m := new(FromAttester)
	if err := x.Ask(fromChallenge(challenge), m); err != nil {
		return nil, err
	}
	if m.GetStatement() == nil {
		return nil, wire.ErrOrder
	}
	evidence := wire.ToEvidence(m.GetStatement())
	if err := pending.Prove(evidence.Proof); err != nil {
		x.finding = x.recent.Find(pending.Pending, evidence)
		return nil, err
	}
	x.proven = true
	x.Proved()
	return evidence, nil
}

// nextLog returns the next part of a log, or nil for another message.
func (x *session) nextLog() (*LogPart, error) {
	m := new(FromAttester)
	err := x.RecvMsg(m)
	return m.GetLog(), err
}

func (x *session) verdict() *Verdict {
	return &Verdict{Time: time.Now().UTC(), Peer: x.Peer, Node: seal.OneLine(x.hello.Node, maxName), EK: remote.EKDigest(x.hello)}
}

func (x *session) accept(passed *remote.Passed) error {
	if x.current.Load().verifier != x.verifier {
		return errChanged
	}
	v := x.verdict()
	v.Accept(passed.Result)
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
	return x.SendMsg(&FromVerifier{Message: &FromVerifier_Signature{&Signature{Signature: signature}}})
}

func (x *session) refuse(r *remote.Refusal) error {
	v := x.verdict()
	sent := wire.RefusalOf(r)
	v.Check, v.Reason, v.Hint, v.Finding = sent.Check, sent.Reason, sent.Hint, string(x.finding)
	x.metrics.refusals.WithLabelValues(v.Check).Inc()
	first := true
	if x.proven {
		x.outcome = outcomeFailed
		if x.audit(v) != nil {
			return errRecord
		}
		x.outcome = outcomeRefused
	} else {
		x.outcome = outcomeUnproven
		first = x.tally.Add(x.kind(v), v)
	}
	if first {
		x.log.Warn("evidence refused", "node", v.Node, "ek", v.EK, "peer", x.Peer, "check", sent.Check, "reason", sent.Reason, "hint", sent.Hint, "finding", x.finding)
	}
	return x.SendMsg(&FromVerifier{Message: &FromVerifier_Refusal{sent}})
}

func (x *session) kind(v *Verdict) wire.Kind {
	k := wire.Kind{Check: v.Check, Finding: v.Finding, From: x.From}
	if _, ok := x.verifier.Nodes[x.hello.Node]; ok {
		k.Node = x.hello.Node
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

// register publishes the metrics; with nil they stay hidden.
func (s *Server) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	gauge := func(name, help string, labels prometheus.Labels, f func() int) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels}, func() float64 { return float64(f()) })
	}
	for _, c := range []prometheus.Collector{
		s.metrics.exchanges, s.metrics.refusals, s.metrics.drops, s.metrics.accepted, s.metrics.audit,
		gauge("kleidi_verifier_connections", "Connections, by whether the peer has proven which TPM it is.", prometheus.Labels{"proven": "no"}, s.wire.Unproven),
		gauge("kleidi_verifier_connections", "Connections, by whether the peer has proven which TPM it is.", prometheus.Labels{"proven": "yes"}, s.wire.Proven),
		gauge("kleidi_verifier_nodes", "Registered nodes.", nil, func() int { return len(s.current.Load().verifier.Nodes) }),
	} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}
