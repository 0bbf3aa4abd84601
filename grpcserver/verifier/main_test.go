package verifier

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"google.golang.org/grpc"

	wire "github.com/beezy-dev/kleidi/grpcserver/internal/exchange"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

var cluster = seal.ClusterID{7}

// rig is a node, and a verifier that listens on loopback.
type rig struct {
	*testing.T
	machine *tpmtest.Machine
	options Options
	server  *Server
	address string
	log     *buffer
	key     []byte // Name of the verifier's

	mu       sync.Mutex
	verdicts []*Verdict
	noRecord error

	conns map[grpc.BidiStreamingClient[FromAttester, FromVerifier]]*grpc.ClientConn // of raw
}

// buffer is a log that several goroutines write.
type buffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func newRig(t *testing.T, change ...func(*Options)) *rig {
	t.Helper()
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	r := &rig{T: t, machine: m, log: &buffer{}, conns: map[grpc.BidiStreamingClient[FromAttester, FromVerifier]]*grpc.ClientConn{}}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := remote.NewKey(key)
	if err != nil {
		t.Fatal(err)
	}
	public, err := authpolicy.PublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if r.key, err = authpolicy.Name(public); err != nil {
		t.Fatal(err)
	}
	registration := remote.Registration{EK: ekOf(t, m), BootPolicy: policyOf(t, m)}
	r.options = Options{
		Verifier:    &remote.Verifier{Cluster: cluster, Keys: []*remote.Key{signer}, Nodes: map[string]remote.Registration{"alpha": registration}},
		Certificate: certificate(t, "verifier.example", nil), Record: r.record, Log: slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Timeout: 2 * time.Minute, hello: time.Minute, proof: 2 * time.Minute,
	}
	for _, f := range change {
		f(&r.options)
	}
	if r.server, err = NewServer(r.options); err != nil {
		t.Fatal(err)
	}
	r.address = serve(t, r.server)
	return r
}

func serve(t *testing.T, s interface {
	Serve(net.Listener) error
	GracefulStop(context.Context)
}) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		s.GracefulStop(ctx)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

func (r *rig) record(v ...*Verdict) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.verdicts = append(r.verdicts, v...)
	return r.noRecord
}

func (r *rig) lastVerdict() Verdict {
	r.Helper()
	r.server.tally.Flush()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.verdicts) == 0 {
		r.Fatal("no verdict")
	}
	return *r.verdicts[len(r.verdicts)-1]
}

func ekOf(t *testing.T, m *tpmtest.Machine) (digest string) {
	t.Helper()
	err := m.TPM().Do(t.Context(), func(tp transport.TPM) (err error) {
		digest, err = keys.EKDigest(tp)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return digest
}

func policyOf(t *testing.T, m *tpmtest.Machine) *bootpolicy.BootPolicy {
	t.Helper()
	log, err := attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}.Read()
	if err != nil {
		t.Fatal(err)
	}
	p, err := bootpolicy.Record(log, crypto.SHA256, []int{0, 4, 7, 11})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// certificate makes a certificate for a name, signed by ca or self-signed.
func certificate(t *testing.T, name string, ca *tls.Certificate) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, BasicConstraintsValid: true, IsCA: ca == nil,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	parent, signer := template, crypto.Signer(key)
	if ca != nil {
		parent, signer = ca.Leaf, ca.PrivateKey.(crypto.Signer)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func pemFile(t *testing.T, c tls.Certificate) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// client returns the node's client, which knows the digest of the verifier's
// certificate.
func (r *rig) client(change ...func(*ClientConfig)) *Client {
	r.Helper()
	c := ClientConfig{Address: r.address, Timeout: 2 * time.Minute, Certificate: Digest(r.options.Certificate.Certificate[0])}
	for _, f := range change {
		f(&c)
	}
	client, err := NewClient(c)
	if err != nil {
		r.Fatal(err)
	}
	return client
}

// ask makes the node ask through a channel, for a session like that of a slot.
func (r *rig) ask(channel remote.Channel) error {
	a := &remote.Attester{Cluster: cluster, Node: "alpha", Key: r.key, Channel: channel, Logs: r.logs}
	return r.machine.TPM().Do(r.Context(), func(t transport.TPM) error {
		return keys.WithSRK(t, keys.Owner{}, nil, func(srk *keys.SRK) error {
			s, done, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, remote.SessionNonceSize)
			if err != nil {
				return err
			}
			defer func() { _ = done() }()
			_, err = a.Sign(r.Context(), t, srk, s.NonceTPM().Buffer)
			return err
		})
	})
}

func (r *rig) logs(crypto.Hash, eventlog.PCRs) (firmware, userspace []byte, err error) {
	firmware, err = os.ReadFile(r.machine.EventLog())
	return firmware, nil, err
}

// altered is a channel whose evidence somebody changes on the node.
type altered struct {
	remote.Channel
	hello    func(*remote.Hello)
	evidence func(*remote.Evidence)
}

// Attest implements remote.Channel.
func (a altered) Attest(ctx context.Context, h *remote.Hello, answer func(*remote.Challenge, []byte) (*remote.Evidence, error)) ([]byte, error) {
	sent := *h
	if a.hello != nil {
		a.hello(&sent)
	}
	return a.Channel.Attest(ctx, &sent, func(c *remote.Challenge, exporter []byte) (*remote.Evidence, error) {
		e, err := answer(c, exporter)
		if err == nil && a.evidence != nil {
			a.evidence(e)
		}
		return e, err
	})
}

func (r *rig) refused(what string, err error, cause seal.Cause, words ...string) {
	r.Helper()
	e, ok := errors.AsType[*seal.Error](err)
	if !ok || e.Cause != cause || e.Hint == "" {
		r.Errorf("%s: %v: cause %q, want %q and a hint", what, err, seal.CauseOf(err), cause)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			r.Errorf("%s: %q does not say %q", what, err, w)
		}
	}
}

// works demands that an honest node is served.
func (r *rig) works(what string) {
	r.Helper()
	r.eventually("a place is free: the server gives it back after its last message", func() bool { return r.server.wire.Proven() < wire.MaxNodePlaces })
	if err := r.ask(r.client()); err != nil {
		r.Errorf("%s: %v", what, err)
	}
}

// eventually waits until ready.
func (r *rig) eventually(what string, ready func() bool) {
	r.Helper()
	timeout := time.NewTimer(2 * time.Minute)
	defer timeout.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ready() {
		select {
		case <-timeout.C:
			r.Fatalf("not in time: %s", what)
		case <-tick.C:
		}
	}
}
