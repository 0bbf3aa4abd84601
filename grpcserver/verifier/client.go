package verifier

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
)

// ClientConfig says where the verifier is, and how it is known: by the digest of
// its certificate, or by a CA and a name.
type ClientConfig struct {
	Address string // host:port
	// Certificate is "sha256:" and the hexadecimal SHA-256 of the verifier's
	// certificate (DER). Nothing else of the certificate counts then, neither its
	// name nor its dates.
	Certificate string
	CAFile      string // PEM
	ServerName  string
	Timeout     time.Duration // of one exchange; 0 is DefaultClientTimeout
}

// DefaultClientTimeout bounds an exchange on the node. The TPM is open for as long,
// so it has to be below the time that a TPM operation may take.
const DefaultClientTimeout = 15 * time.Second

// Client asks a verifier. It implements [remote.Channel].
type Client struct {
	config ClientConfig
	digest []byte
}

// NewClient checks the configuration. It opens nothing; the CA file is read at
// each exchange, so that it can be replaced.
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
		return nil, errors.New("certificate: the digest stands alone; leave out caFile and serverName, or the digest")
	case c.Certificate != "":
		digest, ok := strings.CutPrefix(c.Certificate, "sha256:")
		b, err := hex.DecodeString(digest)
		if !ok || err != nil || len(b) != sha256.Size {
			return nil, fmt.Errorf("certificate: %.80q is no digest; want sha256: and 64 hexadecimal digits, as kleidi verifier init prints it", c.Certificate)
		}
		client.digest = b
	case c.CAFile == "" || c.ServerName == "":
		return nil, errors.New("certificate: nothing says how the verifier is known; set certificate, or caFile and serverName")
	}
	return client, nil
}

// Digest returns how a certificate (DER) stands in ClientConfig.Certificate.
func Digest(certificate []byte) string {
	sum := sha256.Sum256(certificate)
	return "sha256:" + hex.EncodeToString(sum[:])
}

const (
	hintReach = "see that kleidi verifier runs at tpm.verifier.address and can be reached; without it this slot opens nowhere, and kleidi recover --without-verifier with the recovery identity is the way in"
	hintTrust = "compare tpm.verifier.certificate (or caFile and serverName) with what kleidi verifier show prints there; if they are the same, somebody stands in between"
	hintAsk   = "see the log of kleidi verifier"
)

// tlsConfig returns the configuration and where a refusal of the certificate ends
// up, which gRPC reports as text only.
func (c *Client) tlsConfig() (*tls.Config, *error, error) {
	refused := new(error)
	config := &tls.Config{MinVersion: tls.VersionTLS13, ServerName: c.config.ServerName, ClientSessionCache: nil}
	if c.digest != nil {
		config.InsecureSkipVerify = true // VerifyConnection does it
		config.VerifyConnection = func(s tls.ConnectionState) error {
			if sum := sha256.Sum256(s.PeerCertificates[0].Raw); !bytes.Equal(sum[:], c.digest) {
				*refused = fmt.Errorf("its certificate is sha256:%x, not the one that is configured", sum)
			}
			return *refused
		}
		return config, refused, nil
	}
	b, err := os.ReadFile(c.config.CAFile)
	if err != nil {
		return nil, nil, seal.Errorf(seal.CauseCredentials, "see tpm.verifier.caFile", "remote verifier: %w", err)
	}
	config.RootCAs = x509.NewCertPool()
	if !config.RootCAs.AppendCertsFromPEM(b) {
		return nil, nil, seal.Errorf(seal.CauseCredentials, "see tpm.verifier.caFile", "remote verifier: %s holds no certificate in PEM", c.config.CAFile)
	}
	return config, refused, nil
}

// Attest implements [remote.Channel].
func (c *Client) Attest(ctx context.Context, hello *remote.Hello, answer func(*remote.Challenge, []byte) (*remote.Evidence, error)) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.config.Timeout)
	defer cancel()
	config, refused, err := c.tlsConfig()
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("passthrough:///"+c.config.Address, grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithNoProxy(), grpc.WithDisableRetry(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
	if err != nil {
		return nil, c.failed(err, nil)
	}
	defer conn.Close()
	desc := &grpc.StreamDesc{StreamName: methodName, ServerStreams: true, ClientStreams: true}
	raw, err := conn.NewStream(ctx, desc, "/"+serviceName+"/"+methodName)
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
		return seal.Errorf(cause, seal.OneLine(refusal.Hint, maxHint), "remote verifier %s: it refuses: %w", c.config.Address, err)
	}
	hint := hintAsk
	if code := status.Code(err); code == codes.Unavailable || code == codes.DeadlineExceeded {
		hint = hintReach
	}
	return seal.Errorf(seal.CauseUnavailable, hint, "remote verifier %s: %s", c.config.Address, seal.OneLine(status.Convert(err).Message(), maxReason))
}

// refusedError is what the verifier says of the evidence.
type refusedError struct{ *Refusal }

// Error implements error.
func (e *refusedError) Error() string {
	return seal.OneLine(e.Check, maxName) + ": " + seal.OneLine(e.Reason, maxReason)
}

// ownError is an error on this side.
type ownError struct{ error }

// protocolError says that the other side is no kleidi verifier of this version.
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
	exporter, err := d.exporter()
	if err != nil {
		return nil, err
	}
	evidence, err := answer(toChallenge(m.GetChallenge()), exporter)
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

// exporter is known once the verifier has answered.
func (d *dialogue) exporter() ([]byte, error) {
	p, ok := peer.FromContext(d.stream.Context())
	if !ok {
		return nil, &protocolError{"the connection has no TLS state"}
	}
	return exporterOf(p)
}

func (d *dialogue) sendEvidence(e *remote.Evidence) error {
	if err := d.send(fromEvidence(e)); err != nil {
		return err
	}
	for rest := e.FirmwareLog; len(rest) > 0; {
		n := min(len(rest), partSize)
		if err := d.send(&FromAttester{Message: &FromAttester_Log{&LogPart{Firmware: rest[:n]}}}); err != nil {
			return err
		}
		rest = rest[n:]
	}
	for rest := e.UserspaceLog; len(rest) > 0; {
		n := min(len(rest), partSize)
		if err := d.send(&FromAttester{Message: &FromAttester_Log{&LogPart{Userspace: rest[:n]}}}); err != nil {
			return err
		}
		rest = rest[n:]
	}
	return d.stream.CloseSend()
}

// send sends a message. That the verifier has ended the stream is no error here:
// what it said comes next.
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
