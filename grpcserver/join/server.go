package join

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/beezy-dev/kleidi/grpcserver/internal/exchange"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	protocol "github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/attest/joinproof"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Verdict is the result of one join, or of several that were refused for the same
// reason.
type Verdict = exchange.Verdict

// Step holds the audit log's facts about a join, in addition to the evidence.
type Step = exchange.JoinVerdict

// The steps.
const (
	// StepGranted is recorded before the first byte that leads to a KEK leaves this node.
	StepGranted = "granted"
	// StepDone follows once the node has shown that it opened the keyring.
	StepDone = "done"
	// StepListed records a node without a TPM, whose operator carries the keyring to it.
	StepListed = "listed"
)

// Host is the node that gives the KEK.
type Host interface {
	// Verifier returns what a node must prove now; the server supplies its Approval. An
	// error says why no node can join.
	Verifier() (*joinproof.Verifier, error)
	// Admit durably lists a proven node, and returns what the node receives. The keyring
	// must list that machine already, or say of the node's name what was seen. Otherwise the
	// node may have been removed or replaced since the approval, perhaps on another node, and
	// the error is a [*protocol.Refusal] by [protocol.CheckNode].
	Admit(ctx context.Context, p *joinproof.Proven, seen Seen) (*Admission, error)
}

// Admission is a listed node.
type Admission struct {
	Grant
	Node     keyring.Node
	KeyID    seal.KeyID
	Revision uint64
	// Done returns the MAC by which the node shows that it has opened the keyring.
	Done func(transcript []byte) []byte
}

// MaxConns is the number of connections that a Server admits from peers without a proof.
const MaxConns = exchange.MaxUnproven

// Options configure a Server. Timeout is optional.
type Options struct {
	Host Host
	// Record records verdicts before the node learns of them. If it fails, the answer
	// is no. Refusals before a proof are counted and recorded later.
	Record  func(...*Verdict) error
	Log     *slog.Logger
	Timeout time.Duration // of one join; 0 is DefaultTimeout

	hello, proof time.Duration
	now          func() time.Time
}

// Server answers joining nodes.
type Server struct {
	host        Host
	record      func(...*Verdict) error
	log         *slog.Logger
	certificate *tls.Certificate
	approvals   *approvals
	tally       exchange.Tally
	recent      protocol.Recent
	wire        *exchange.Server
}

// NewServer makes a Server with a new certificate.
func NewServer(o Options) (*Server, error) {
	certificate, err := newCertificate()
	if err != nil {
		return nil, err
	}
	now := time.Now
	if o.now != nil {
		now = o.now
	}
	s := &Server{host: o.Host, record: o.Record, log: o.Log, certificate: certificate, approvals: newApprovals(now)}
	s.tally.Write = func(sums []*Verdict) error { return s.audit(sums...) }
	s.wire = exchange.NewServer(exchange.Options{Service: service, Certificate: func() *tls.Certificate { return certificate }, Answer: s.answer,
		Dropped: func(string) {}, Log: o.Log, Timeout: cmp.Or(o.Timeout, DefaultTimeout), Hello: o.hello, Proof: o.proof})
	return s, nil
}

// newCertificate makes the server's certificate. Nodes recognise it by its digest, so
// its other contents do not matter.
func newCertificate() (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: "kleidi join"}, NotBefore: time.Unix(0, 0), NotAfter: time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("certificate for joins: %w", err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// Certificate returns the digest by which nodes recognise this server.
func (s *Server) Certificate() string { return exchange.Digest(s.certificate.Certificate[0]) }

// Approve lets a node join once. The server owns the approval's files from now on.
func (s *Server) Approve(a *Approval) error { return s.approvals.put(a) }

// Forget ends the approval of a node. A join in progress is refused at its next step.
func (s *Server) Forget(node string) { s.approvals.forget(node) }

// Unfinished returns the listed nodes that have not yet shown that they opened the
// keyring.
func (s *Server) Unfinished() map[string]bool { return s.approvals.pending() }

// Unused returns the approvals that no node has used.
func (s *Server) Unused() []Approved { return s.approvals.unused() }

// Serve answers on l until it is stopped. Stopping is not an error.
func (s *Server) Serve(l net.Listener) error { return s.wire.Serve(l) }

// GracefulStop closes the listener, lets joins in progress end, and cuts them off when
// ctx is done. It forgets the approvals.
func (s *Server) GracefulStop(ctx context.Context) {
	s.wire.GracefulStop(ctx)
	s.tally.Flush()
	s.approvals.close()
}

// Errors of the exchange itself. A fault of the evidence is a refusal.
var (
	errRecord = status.Error(codes.FailedPrecondition, "the node that gives the KEK can't write its audit log, so the answer is no; see the log of kleidi serve there")
	errAdmit  = status.Error(codes.FailedPrecondition, "the node that gives the KEK can't list this node; see the log of kleidi serve there")
	errLocked = status.Error(codes.FailedPrecondition, "the node that gives the KEK is not ready for it; see kleidi status there")
)

// session is one join, on V's side.
type session struct {
	*Server
	*exchange.Stream
	hello  *joinproof.Hello
	entry  *entry
	proven bool
	// finding is for this side's log and audit log alone.
	finding protocol.Finding
}

func (s *Server) answer(stream *exchange.Stream) error {
	x := &session{Server: s, Stream: stream}
	err := x.run()
	if refusal, ok := errors.AsType[*protocol.Refusal](err); ok {
		return x.refuse(refusal)
	}
	if err != nil {
		x.log.Info("a join ended early", "peer", x.Peer, "error", seal.OneLine(err.Error(), exchange.MaxReason))
	}
	return err
}

// run takes the node through the join. Until the proof, the node costs two short
// messages and a place in the crowd. Afterwards only this exchange uses the approval.
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
	leave, err := x.approvals.take(x.entry, x.hello)
	if err != nil {
		return err
	}
	defer leave()
	if err := exchange.ReadLogs(evidence, x.logParts()); err != nil {
		return err
	}
	proven, err := pending.Judge(evidence)
	if err != nil {
		return err
	}
	// The node takes its time over the logs. Meanwhile the operator may have removed it.
	if err := x.approvals.check(x.entry); err != nil {
		return err
	}
	return x.admit(proven, pending.Transcript())
}

// challenge demands the same as [joinproof.Verifier.Challenge], and that the approval is
// still valid. Only a peer that claims the approved endorsement key learns that the
// approval is spent or expired.
func (x *session) challenge() (*joinproof.Pending, *protocol.Challenge, error) {
	m := new(FromJoiner)
	if err := x.First(m); err != nil {
		return nil, nil, err
	}
	if m.GetHello() == nil {
		return nil, nil, exchange.ErrOrder
	}
	x.hello = toHello(m.GetHello())
	v, err := x.host.Verifier()
	if err != nil {
		x.log.Warn("a node asks to join, but no node can join now", "peer", x.Peer, "error", err)
		return nil, nil, errLocked
	}
	x.entry = x.approvals.find(x.hello.Node)
	v.Approval = func(string) *joinproof.Approval {
		if x.entry == nil {
			return nil
		}
		return &x.entry.Approval.Approval
	}
	pending, challenge, err := v.Challenge(x.hello, x.Exporter)
	if err == nil {
		err = x.approvals.check(x.entry)
	}
	return pending, challenge, err
}

func (x *session) prove(pending *joinproof.Pending, challenge *protocol.Challenge) (*protocol.Evidence, error) {
	m := new(FromJoiner)
	if err := x.Ask(fromChallenge(challenge), m); err != nil {
		return nil, err
	}
	if m.GetStatement() == nil {
		return nil, exchange.ErrOrder
	}
	evidence := exchange.ToEvidence(m.GetStatement())
	if err := pending.Prove(evidence.Proof); err != nil {
		x.finding = x.recent.Find(pending.Pending, evidence)
		return nil, err
	}
	x.proven = true
	x.Proved()
	return evidence, nil
}

// logParts returns the parts of the logs, up to the part marked as last. The stream
// continues after it.
func (x *session) logParts() func() (*exchange.LogPart, error) {
	ended := false
	return func() (*exchange.LogPart, error) {
		if ended {
			return nil, io.EOF
		}
		m := new(FromJoiner)
		if err := x.RecvMsg(m); err != nil {
			if errors.Is(err, io.EOF) {
				err = exchange.ErrOrder
			}
			return nil, err
		}
		ended = m.GetLog().GetLast()
		return m.GetLog(), nil
	}
}

// admit durably lists the node, then flushes the audit record, and only then sends the
// grant. So every holder of a KEK is in the list of nodes. An approval that the keyring
// contradicts ends: the operator who gave it did not know what has happened since.
func (x *session) admit(proven *joinproof.Proven, transcript []byte) error {
	admission, err := x.host.Admit(x.Context(), proven, x.approvals.seen(x.entry))
	if refusal, ok := errors.AsType[*protocol.Refusal](err); ok {
		if refusal.Check == protocol.CheckNode {
			x.approvals.withdraw(x.entry)
		}
		return refusal
	}
	if err != nil {
		x.log.Error("a node has proven its TPM and its boot, and can't be listed", "node", proven.Peer.Node, "error", err)
		return errAdmit
	}
	if err := x.approvals.bind(x.entry, x.hello, admission.Node); err != nil {
		return err
	}
	admission.Files = x.approvals.files(x.entry)
	defer admission.Wipe()
	v := x.verdict()
	v.Accept(proven.Result)
	v.Join = &exchange.JoinVerdict{Step: StepGranted, KeyID: admission.KeyID, Revision: admission.Revision, BootPolicy: policyDigest(x.entry.Approval)}
	for _, f := range admission.Files {
		v.Join.Files = append(v.Join.Files, f.Name)
	}
	if x.audit(v) != nil {
		return errRecord
	}
	x.log.Info("a node has proven its TPM and its boot, and is given the keyring", "node", v.Node, "ek", v.EK, "peer", v.Peer, "revision", admission.Revision)
	if err := x.SendMsg(fromGrant(&admission.Grant)); err != nil {
		return err
	}
	return x.finish(admission, transcript)
}

// finish waits for the node to show that it has opened the keyring, which spends the
// approval.
func (x *session) finish(a *Admission, transcript []byte) error {
	m := new(FromJoiner)
	if err := x.RecvMsg(m); err != nil {
		if errors.Is(err, io.EOF) {
			err = exchange.ErrOrder
		}
		return err
	}
	if !equalMAC(m.GetDone().GetMac(), a.Done(transcript)) {
		return protocol.Refuse(CheckDone, protocol.HintForged, "the node does not show that it has opened the keyring")
	}
	x.approvals.spend(x.entry)
	v := x.verdict()
	v.Accepted, v.Join = true, &exchange.JoinVerdict{Step: StepDone, KeyID: a.KeyID, Revision: a.Revision}
	if x.audit(v) != nil {
		return errRecord
	}
	x.log.Info("a node has joined", "node", v.Node, "ek", v.EK, "peer", v.Peer)
	return x.SendMsg(&FromVerifier{Message: &FromVerifier_Finished{&Finished{}}})
}

func (x *session) verdict() *Verdict {
	return &Verdict{Time: time.Now().UTC(), Peer: x.Peer, Node: seal.OneLine(x.hello.Node, exchange.MaxName), EK: keys.EKDigestOf(x.hello.EK)}
}

func (x *session) refuse(r *protocol.Refusal) error {
	v := x.verdict()
	sent := exchange.RefusalOf(r)
	v.Check, v.Reason, v.Hint, v.Finding = sent.Check, sent.Reason, sent.Hint, string(x.finding)
	first := true
	if x.proven {
		if x.audit(v) != nil {
			return errRecord
		}
	} else {
		k := exchange.Kind{Check: v.Check, Finding: v.Finding, From: x.From}
		if x.entry != nil {
			k.Node = x.entry.Node
		}
		first = x.tally.Add(k, v)
	}
	if first {
		x.log.Warn("a join is refused", "node", v.Node, "ek", v.EK, "peer", x.Peer, "check", sent.Check, "reason", sent.Reason, "hint", sent.Hint, "finding", x.finding)
	}
	return x.SendMsg(&FromVerifier{Message: &FromVerifier_Refusal{sent}})
}

// audit writes verdicts to the audit log.
func (s *Server) audit(verdicts ...*Verdict) error {
	err := s.record(verdicts...)
	if err != nil {
		s.log.Error("the audit log can't be written, so the answer is no", "node", verdicts[0].Node, "peer", verdicts[0].Peer, "error", err)
	}
	return err
}
