package verifier

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	wire "github.com/beezy-dev/kleidi/grpcserver/internal/exchange"
	"github.com/beezy-dev/kleidi/internal/ownership"
	"github.com/beezy-dev/kleidi/internal/regular"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
)

// ClientConfig holds the address of the verifier, and how to recognise it: by the
// digest of its certificate, or by a CA and a name.
type ClientConfig struct {
	Address string // host:port
	// Certificate is "sha256:" and the hexadecimal SHA-256 of the verifier's
	// certificate (DER). If set, the name and the dates in the certificate do not
	// count.
	Certificate string
	CAFile      string // PEM
	ServerName  string
	Timeout     time.Duration // of one exchange; 0 is DefaultClientTimeout
}

// DefaultClientTimeout bounds an exchange on the node. The TPM stays open meanwhile, so
// the timeout must be shorter than that of a TPM operation.
const DefaultClientTimeout = 15 * time.Second

// Client asks a verifier. It implements [remote.Channel].
type Client struct {
	config ClientConfig
	digest []byte
}

// NewClient checks the configuration. It opens nothing. Each exchange reads the CA file
// again, so the file can be replaced.
func NewClient(c ClientConfig) (*Client, error) {
	if _, _, err := net.SplitHostPort(c.Address); err != nil {
		return nil, fmt.Errorf("address: %w; want host:port", err)
	}
	if c.Timeout == 0 {
		c.Timeout = DefaultClientTimeout
	}
	client := &Client{config: c}
	switch {
	case c.Certificate != "" && (c.CAFile != "" || c.ServerName != ""):
		return nil, errors.New("certificate: a digest excludes caFile and serverName; leave out one or the other")
	case c.Certificate != "":
		b, err := wire.ParseDigest(c.Certificate)
		if err != nil {
			return nil, fmt.Errorf("certificate: %w, as kleidi verifier init prints it", err)
		}
		client.digest = b
	case c.CAFile == "" || c.ServerName == "":
		return nil, errors.New("certificate: nothing identifies the verifier; set certificate, or caFile and serverName")
	}
	return client, nil
}

// Digest returns the digest of a certificate (DER) for ClientConfig.Certificate.
func Digest(certificate []byte) string { return wire.Digest(certificate) }

const (
	hintReach = "check that kleidi verifier runs at tpm.verifier.address and can be reached"
	hintTrust = "compare tpm.verifier.certificate (or caFile and serverName) with what kleidi verifier show prints there; if they are the same, somebody is intercepting the connection"
	hintAsk   = "see the log of kleidi verifier"
)

// tlsConfig returns the configuration, and a pointer to the refusal of a certificate,
// which gRPC reports only as text.
func (c *Client) tlsConfig() (*tls.Config, *error, error) {
	refused := new(error)
	config := &tls.Config{MinVersion: tls.VersionTLS13, ServerName: c.config.ServerName, ClientSessionCache: nil}
	if c.digest != nil {
		wire.Pin(config, c.digest, refused)
		return config, refused, nil
	}
	b, err := c.readCAs()
	if err != nil {
		return nil, nil, err
	}
	config.RootCAs = x509.NewCertPool()
	if !config.RootCAs.AppendCertsFromPEM(b) {
		return nil, nil, seal.Errorf(seal.CauseCredentials, "see tpm.verifier.caFile", "remote verifier: %s holds no certificate in PEM", c.config.CAFile)
	}
	return config, refused, nil
}

// readCAs reads a file that nobody else may change: with another CA an attacker could
// pose as the verifier.
func (c *Client) readCAs() ([]byte, error) {
	f, err := regular.Open(c.config.CAFile)
	if err == nil {
		defer f.Close()
		err = ownership.CheckOpen(f)
	}
	if err != nil {
		return nil, seal.Caused(seal.CauseCredentials, "see tpm.verifier.caFile", "remote verifier", err)
	}
	return io.ReadAll(f)
}

// Attest implements [remote.Channel].
func (c *Client) Attest(ctx context.Context, hello *remote.Hello, answer func(*remote.Challenge, []byte) (*remote.Evidence, error)) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.config.Timeout)
	defer cancel()
	config, refused, err := c.tlsConfig()
	if err != nil {
		return nil, err
	}
	conn, err := wire.Dial(c.config.Address, config, maxMessage)
	if err != nil {
		return nil, c.failed(err, nil)
	}
	defer conn.Close()
	raw, err := wire.Open(ctx, conn, service)
	if err != nil {
		return nil, c.failed(err, *refused)
	}
	d := &dialogue{&grpc.GenericClientStream[FromAttester, FromVerifier]{ClientStream: raw}}
	signature, err := d.run(hello, answer)
	var own *ownError
	if errors.As(err, &own) {
		return nil, own.error
	}
	if err != nil {
		return nil, c.failed(err, *refused)
	}
	return signature, nil
}

// failed gives an error its cause and hint.
func (c *Client) failed(err, certificate error) error {
	var refusal *refusedError
	switch {
	case certificate != nil:
		return seal.Errorf(seal.CauseUnavailable, hintTrust, "remote verifier %s: %w", c.config.Address, certificate)
	case errors.As(err, &refusal):
		cause := seal.CauseAttestation
		if refusal.Check == string(remote.CheckBootPolicy) {
			cause = seal.CauseBootPolicy
		}
		return seal.Errorf(cause, hintOf(refusal.Check), "remote verifier %s: it refuses: %w", c.config.Address, err)
	}
	e := &seal.Error{Hint: hintAsk}
	if code := status.Code(err); code == codes.Unavailable || code == codes.DeadlineExceeded {
		e.Hint, e.NoRecovery = hintReach+"; if it is gone for good, run kleidi recover --without-verifier with the recovery identity", hintReach
	}
	e.Cause, e.Err = seal.CauseUnavailable, fmt.Errorf("remote verifier %s: %s", c.config.Address, quoted(status.Convert(err).Message(), maxReason))
	return e
}

// hints say what to do next on this side. They are kleidi's own. A verifier's text is
// quoted, so that an operator does not mistake it for the advice of the local command.
var hints = map[remote.Check]string{
	remote.CheckMessage:       hintVersions,
	remote.CheckCluster:       "compare clusterID in the verifier's configuration with what kleidi status shows here",
	remote.CheckNode:          hintRegistered,
	remote.CheckKey:           "compare tpm.verifier.publicKey with what kleidi verifier show prints there; a slot made under a former key needs formerSigningKeys in the verifier's configuration",
	remote.CheckEK:            hintRegistered,
	remote.CheckEKCertificate: "see ekCertificates.folder in the verifier's configuration",
	remote.CheckAK:            hintVersions,
	remote.CheckProof:         "if another machine answers in this one's place, or somebody intercepts its connection to the verifier, find out who; otherwise check that both sides run the same version of kleidi",
	remote.CheckEvidence:      "if a component extends a PCR without logging it, leave that PCR out of the node's boot policy on the verifier's machine; else this machine's event log was tampered with",
	remote.CheckSRK:           hintVersions,
	remote.CheckBootPolicy:    "if this boot is one that you want, run kleidi bootpolicy record here, and let the boot policy on the verifier's machine allow it",
}

const (
	hintVersions   = "check that both sides run the same version of kleidi; if they do, find out what runs in this machine's place"
	hintRegistered = "compare node and endorsement key that kleidi status shows here with nodes in the verifier's configuration; run kleidi verifier register NODE --ek sha256:… --boot-policy FILE there, if the node is missing"
)

func hintOf(check string) string {
	if hint, ok := hints[remote.Check(check)]; ok {
		return hint
	}
	return hintAsk
}

func quoted(s string, limit int) string { return wire.Quoted(s, limit) }

// refusedError is the verifier's refusal of the evidence.
type refusedError struct{ *Refusal }

// Error implements error.
func (e *refusedError) Error() string {
	if _, known := hints[remote.Check(e.Check)]; known {
		return e.Check + ": " + quoted(e.Reason, maxReason)
	}
	return quoted(e.Check+": "+e.Reason, maxReason) + ", and advises " + quoted(e.Hint, maxHint)
}

// ownError is an error on this side.
type ownError struct{ error }

// protocolError says that the other side is not a kleidi verifier of this version.
type protocolError struct{ what string }

// Error implements error.
func (e *protocolError) Error() string { return e.what }

// dialogue is one stream, from the attester's side.
type dialogue struct {
	stream grpc.BidiStreamingClient[FromAttester, FromVerifier]
}

func (d *dialogue) run(hello *remote.Hello, answer func(*remote.Challenge, []byte) (*remote.Evidence, error)) ([]byte, error) {
	if err := d.send(fromHello(hello)); err != nil {
		return nil, err
	}
	m, err := d.receive()
	if err != nil {
		return nil, err
	}
	if m.GetChallenge() == nil {
		return nil, &protocolError{"it answers without a challenge"}
	}
	exporter, err := wire.ExporterOf(d.stream, remote.ExporterLabel)
	if err != nil {
		return nil, err
	}
	evidence, err := answer(wire.ToChallenge(m.GetChallenge()), exporter)
	if err != nil {
		return nil, &ownError{err}
	}
	if err := d.sendEvidence(evidence); err != nil {
		return nil, err
	}
	if m, err = d.receive(); err != nil {
		return nil, err
	}
	if len(m.GetSignature().GetSignature()) == 0 {
		return nil, &protocolError{"it answers without a signature"}
	}
	return m.GetSignature().GetSignature(), nil
}

func (d *dialogue) sendEvidence(e *remote.Evidence) error {
	if err := d.send(fromEvidence(e)); err != nil {
		return err
	}
	err := wire.Parts(e, func(part *LogPart) error { return d.send(&FromAttester{Message: &FromAttester_Log{part}}) })
	if err != nil {
		return err
	}
	return d.stream.CloseSend()
}

// send sends a message. It ignores that the verifier has ended the stream: the
// verifier's answer comes next.
func (d *dialogue) send(m *FromAttester) error {
	if err := d.stream.Send(m); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

func (d *dialogue) receive() (*FromVerifier, error) {
	m, err := d.stream.Recv()
	if errors.Is(err, io.EOF) {
		return nil, &protocolError{"it ended the exchange without an answer"}
	}
	if err != nil {
		return nil, err
	}
	if r := m.GetRefusal(); r != nil {
		return nil, &refusedError{r}
	}
	return m, nil
}
