package join

import (
	"context"
	"crypto/hmac"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/beezy-dev/kleidi/grpcserver/internal/exchange"
	"github.com/beezy-dev/kleidi/seal"
	protocol "github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/attest/joinproof"
)

// CheckDone is the last check of a join.
const CheckDone protocol.Check = "proof of the opened keyring"

func equalMAC(a, b []byte) bool { return len(a) > 0 && len(a) <= maxMAC && hmac.Equal(a, b) }

// Client is the client of a joining node.
type Client struct {
	address string
	digest  []byte
}

// NewClient returns the client for a server with that certificate digest. It opens
// nothing.
func NewClient(address, certificate string) (*Client, error) {
	if _, _, err := net.SplitHostPort(address); err != nil {
		return nil, fmt.Errorf("%w; want host:port", err)
	}
	digest, err := exchange.ParseDigest(certificate)
	if err != nil {
		return nil, fmt.Errorf("--verifier: %w, as kleidi node approve prints it", err)
	}
	return &Client{address, digest}, nil
}

// Session is one join, on J's side.
type Session struct {
	client  *Client
	conn    *grpc.ClientConn
	stream  grpc.ClientStream
	cancel  context.CancelFunc
	node    string
	refused error // the reason why the certificate was refused
}

// Begin says hello, and returns V's challenge.
func (c *Client) Begin(ctx context.Context, h *joinproof.Hello) (*Session, *protocol.Challenge, error) {
	ctx, cancel := context.WithTimeout(ctx, DefaultTimeout)
	s := &Session{client: c, cancel: cancel, node: h.Node}
	config := &tls.Config{MinVersion: tls.VersionTLS13}
	exchange.Pin(config, c.digest, &s.refused)
	var err error
	if s.conn, err = exchange.Dial(c.address, config, maxGrant); err != nil {
		cancel()
		return nil, nil, s.failed(err)
	}
	challenge, err := s.begin(ctx, h)
	if err != nil {
		s.Close()
		return nil, nil, s.failed(err)
	}
	return s, challenge, nil
}

func (s *Session) begin(ctx context.Context, h *joinproof.Hello) (_ *protocol.Challenge, err error) {
	if s.stream, err = exchange.Open(ctx, s.conn, service); err != nil {
		return nil, err
	}
	if err := s.send(fromHello(h)); err != nil {
		return nil, err
	}
	m, err := s.receive()
	if err != nil {
		return nil, err
	}
	if m.GetChallenge() == nil {
		return nil, errNoAnswer
	}
	return exchange.ToChallenge(m.GetChallenge()), nil
}

// Exporter returns the exporter value of the TLS connection.
func (s *Session) Exporter() ([]byte, error) {
	return exchange.ExporterOf(s.stream, joinproof.ExporterLabel)
}

// Prove sends the evidence, and returns V's grant.
func (s *Session) Prove(e *protocol.Evidence) (*Grant, error) {
	g, err := s.prove(e)
	if err != nil {
		return nil, s.failed(err)
	}
	return g, nil
}

func (s *Session) prove(e *protocol.Evidence) (*Grant, error) {
	if err := s.send(fromEvidence(e)); err != nil {
		return nil, err
	}
	return s.sendLogs(e)
}

// sendLogs sends the logs of the evidence, and returns V's grant.
func (s *Session) sendLogs(e *protocol.Evidence) (*Grant, error) {
	if err := exchange.Parts(e, func(p *exchange.LogPart) error { return s.send(fromPart(p)) }); err != nil {
		return nil, err
	}
	if err := s.send(fromPart(&exchange.LogPart{Last: true})); err != nil {
		return nil, err
	}
	m, err := s.receive()
	if err != nil {
		return nil, err
	}
	if m.GetGrant() == nil {
		return nil, errNoAnswer
	}
	g := toGrant(m.GetGrant())
	if err := g.check(s.node); err != nil {
		return nil, &answerError{"it is not an answer that kleidi gives: " + err.Error()}
	}
	return g, nil
}

// Done shows V that the keyring is open, and returns once V has recorded that.
func (s *Session) Done(mac []byte) error {
	err := s.send(&FromJoiner{Message: &FromJoiner_Done{&Done{Mac: mac}}})
	if err == nil {
		err = s.stream.CloseSend()
	}
	if err != nil {
		return s.failed(err)
	}
	m, err := s.receive()
	if err == nil && m.GetFinished() == nil {
		err = errNoAnswer
	}
	if err != nil {
		return s.failed(err)
	}
	return nil
}

// Close ends the connection.
func (s *Session) Close() {
	s.cancel()
	_ = s.conn.Close()
}

// send sends a message. It ignores that the other side has ended the stream: the other
// side's answer comes next.
func (s *Session) send(m *FromJoiner) error {
	if err := s.stream.SendMsg(m); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

func (s *Session) receive() (*FromVerifier, error) {
	m := new(FromVerifier)
	err := s.stream.RecvMsg(m)
	if errors.Is(err, io.EOF) {
		return nil, errNoAnswer
	}
	if err != nil {
		return nil, err
	}
	if r := m.GetRefusal(); r != nil {
		return nil, &refusedError{r}
	}
	return m, nil
}

// answerError says that the other side is not a kleidi serve of this version.
type answerError struct{ what string }

// Error implements error.
func (e *answerError) Error() string { return e.what }

var errNoAnswer = &answerError{"it ended the join, or answered out of order"}

// refusedError is V's refusal of the evidence.
type refusedError struct{ *exchange.Refusal }

// Error implements error.
func (e *refusedError) Error() string {
	if _, known := hints[protocol.Check(e.Check)]; known {
		return e.Check + ": " + exchange.Quoted(e.Reason, exchange.MaxReason)
	}
	return exchange.Quoted(e.Check+": "+e.Reason, exchange.MaxReason) + ", and advises " + exchange.Quoted(e.Hint, exchange.MaxHint)
}

const (
	hintReach    = "check that kleidi serve runs there with join.listen set, and that its address can be reached"
	hintTrust    = "the process that printed the command may have been restarted: run kleidi node approve NAME --ek EK there again; if it was not restarted, somebody is intercepting the connection"
	hintAsk      = "see the log of kleidi serve on that node"
	hintVersions = "check that both sides run the same version of kleidi; if they do, find out what runs in this machine's place"
	hintIdentity = "compare what kleidi node identity shows here with what was approved; run kleidi node approve NAME --ek EK again on that node"
)

// hints say what to do next on this side. They are kleidi's own. V's text is quoted, so
// that an operator does not mistake it for the advice of the local command.
var hints = map[protocol.Check]string{
	protocol.CheckMessage:       hintVersions,
	protocol.CheckCluster:       "run the command that was printed when this node was approved",
	protocol.CheckNode:          hintIdentity,
	protocol.CheckEK:            hintIdentity,
	protocol.CheckEKCertificate: "see which manufacturers' certificates that node accepts",
	joinproof.CheckFormat:       "install the version of kleidi that runs on that node",
	joinproof.CheckVerifier:     "set tpm.verifier here as it is set on that node",
	joinproof.CheckSigner:       "have the node join without a signer, and add its signed boot states afterwards with kleidi bootstate add FILE --public-key FILE",
	joinproof.CheckPCRs:         "leave tpm.pcrs and tpm.bank out here; see docs/boot-states.md for which PCRs a boot needs",
	protocol.CheckSRK:           hintVersions,
	protocol.CheckAK:            hintVersions,
	protocol.CheckProof:         "if another machine answers in this one's place, or somebody intercepts its connection to that node, find out who; otherwise check that both sides run the same version of kleidi",
	protocol.CheckEvidence:      "if a component extends a PCR without logging it, leave that PCR out of the boot policy; else this machine's event log was tampered with",
	protocol.CheckBootPolicy:    "if you want this boot, run kleidi bootpolicy record here, and approve the node again with --boot-policy and that file",
	joinproof.CheckPhase:        "join while the machine is up",
	CheckDone:                   hintVersions,
}

// failed gives an error its cause and hint.
func (s *Session) failed(err error) error {
	var refusal *refusedError
	if s.refused != nil {
		return seal.Errorf(seal.CauseUnavailable, hintTrust, "join %s: %w", s.client.address, s.refused)
	}
	if errors.As(err, &refusal) {
		cause := seal.CauseAttestation
		if refusal.Check == string(protocol.CheckBootPolicy) {
			cause = seal.CauseBootPolicy
		}
		hint, ok := hints[protocol.Check(refusal.Check)]
		if !ok {
			hint = hintAsk
		}
		return seal.Errorf(cause, hint, "join %s: it refuses: %w", s.client.address, err)
	}
	hint := hintAsk
	if code := status.Code(err); code == codes.Unavailable || code == codes.DeadlineExceeded {
		hint = hintReach
	}
	return seal.Errorf(seal.CauseUnavailable, hint, "join %s: %s", s.client.address, exchange.Quoted(status.Convert(err).Message(), exchange.MaxReason))
}
