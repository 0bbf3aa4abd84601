package verifier

import (
	"crypto/tls"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// TestExchange: an exchange over the wire has the same result as in memory, with logs
// of many parts, and everything is recorded.
func TestExchange(t *testing.T) {
	r := newRig(t)
	r.works("an ordinary exchange")
	v := r.lastVerdict()
	if !v.Accepted || v.Node != "alpha" || v.EK != r.options.Verifier.Nodes["alpha"].EK || v.Check != "" || v.Reason != "" || v.Bank != "sha256" ||
		len(v.PCRs) != 4 || len(v.PCRs[7]) != 64 || len(v.Session) != 2*remote.SessionNonceSize || v.Time.IsZero() || !strings.HasPrefix(v.Peer, "127.0.0.1:") {
		t.Errorf("%+v", v)
	}
	long := altered{Channel: r.client(), evidence: func(e *remote.Evidence) {
		log, err := eventlog.Parse(e.FirmwareLog)
		if err != nil {
			t.Fatal(err)
		}
		for range 9 {
			log.Append([]eventlog.Event{eventlog.Informational(log.Banks, 0, make([]byte, partSize/2))})
		}
		if e.FirmwareLog = log.Encode(); len(e.FirmwareLog) < 4*partSize {
			t.Fatalf("%d bytes", len(e.FirmwareLog))
		}
	}}
	if err := r.ask(long); err != nil {
		t.Errorf("a long log: %v", err)
	}
	if !strings.Contains(r.log.String(), `msg="evidence accepted" node=alpha`) {
		t.Errorf("log: %s", r.log)
	}
}

// TestRefusals: refusals reach the node and the record, with their cause, reason and
// hint.
func TestRefusals(t *testing.T) {
	r := newRig(t)
	hello := r.hello()
	name := func(n string) func(*remote.Hello) { return func(h *remote.Hello) { h.Node = n } }
	r.refused("unknown node", r.ask(altered{Channel: r.client(), hello: name("x\x1b[2J" + strings.Repeat("é", 90))}), seal.CauseAttestation, `it refuses: node: "node 'x\x1b[2J`, "is not registered", "run kleidi verifier register NODE --ek sha256:… --boot-policy FILE there, if the node is missing")
	if v := r.lastVerdict(); v.Accepted || v.Check != string(remote.CheckNode) || strings.ContainsAny(v.Node+v.Reason, "\x1b\n") || len(v.Node) > 2*maxName+4 || v.Hint == "" || v.PCRs != nil {
		t.Errorf("%+v", v)
	}
	r.refused("cut log", r.ask(altered{Channel: r.client(), evidence: func(e *remote.Evidence) { e.FirmwareLog = e.FirmwareLog[:len(e.FirmwareLog)-1] }}), seal.CauseAttestation, `evidence: "firmware event log`)
	if v := r.lastVerdict(); v.Accepted || v.Node != "alpha" || v.Check != string(remote.CheckEvidence) {
		t.Errorf("%+v", v)
	}
	r.options.Verifier.EKCertificate = func([]byte, []byte) error { return errors.New("\x1b[2J\n" + strings.Repeat("x", 5000)) }
	r.refused("a reason that quotes anything", r.ask(r.client()), seal.CauseAttestation, `endorsement key certificate: "?[2J?xxx`)
	if v := r.lastVerdict(); strings.ContainsAny(v.Reason, "\x1b\n") || len(v.Reason) > maxReason+8 {
		t.Errorf("%d bytes: %q", len(v.Reason), v.Reason)
	}
	r.options.Verifier.EKCertificate = nil
	other := simboot.Baseline(simboot.UKI)
	other.CommandLine = "init=/bin/sh"
	r.machine.Reboot(other)
	r.refused("another boot", r.ask(r.client()), seal.CauseBootPolicy, "boot policy: ", "pcrs.4", "unified kernel image")
	if v := r.lastVerdict(); v.Accepted || v.Check != string(remote.CheckBootPolicy) {
		t.Errorf("%+v", v)
	}
	own := errors.New("the node's own trouble")
	if _, err := r.client().Attest(t.Context(), hello, func(*remote.Challenge, []byte) (*remote.Evidence, error) { return nil, own }); !errors.Is(err, own) {
		t.Errorf("an error on the node: %v", err)
	}
}

// TestNoRecordNoSignature: without the audit log the answer is no.
func TestNoRecordNoSignature(t *testing.T) {
	r := newRig(t)
	r.noRecord = errors.New("no space left on device")
	r.refused("accepted evidence", r.ask(r.client()), seal.CauseUnavailable, "can't write its audit log")
	if v := r.lastVerdict(); !v.Accepted {
		t.Errorf("it was another reason: %+v", v)
	}
	r.refused("refused evidence", r.ask(altered{Channel: r.client(), evidence: func(e *remote.Evidence) { e.FirmwareLog = nil }}), seal.CauseUnavailable, "can't write its audit log")
	if !strings.Contains(r.log.String(), "no space left") {
		t.Errorf("log: %s", r.log)
	}
}

// TestTrust: the node talks only to the configured verifier.
func TestTrust(t *testing.T) {
	ca := certificate(t, "ca.example", nil)
	r := newRig(t, func(o *Options) { o.Certificate = certificate(t, "verifier.example", &ca) })
	other := certificate(t, "verifier.example", nil)
	byCA := func(file, name string) func(*ClientConfig) {
		return func(c *ClientConfig) { c.Certificate, c.CAFile, c.ServerName = "", file, name }
	}
	r.works("by digest")
	if err := r.ask(r.client(byCA(pemFile(t, ca), "verifier.example"))); err != nil {
		t.Errorf("by CA: %v", err)
	}
	before := len(r.verdicts)
	r.refused("another digest", r.ask(r.client(func(c *ClientConfig) { c.Certificate = Digest(other.Certificate[0]) })), seal.CauseUnavailable, "not the one that is configured", "somebody is intercepting the connection")
	r.refused("another CA", r.ask(r.client(byCA(pemFile(t, other), "verifier.example"))), seal.CauseUnavailable, "certificate")
	r.refused("another name", r.ask(r.client(byCA(pemFile(t, ca), "other.example"))), seal.CauseUnavailable, "other.example")
	loose := filepath.Join(t.TempDir(), "ca.pem")
	if err := errors.Join(os.WriteFile(loose, nil, 0o600), os.Chmod(loose, 0o666)); err != nil {
		t.Fatal(err)
	}
	r.refused("a CA file that others may write", r.ask(r.client(byCA(loose, "verifier.example"))), seal.CauseCredentials, "has mode 0666, so others can change it", "chmod go-w "+loose)
	r.refused("no CA file", r.ask(r.client(byCA(filepath.Join(t.TempDir(), "none"), "verifier.example"))), seal.CauseCredentials, "no such file", "tpm.verifier.caFile")
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r.refused("no certificate in it", r.ask(r.client(byCA(empty, "verifier.example"))), seal.CauseCredentials, "holds no certificate")
	if len(r.verdicts) != before {
		t.Error("the verifier heard of it")
	}
	r.refused("nobody there", r.ask(r.client(func(c *ClientConfig) { c.Address = "127.0.0.1:1" })), seal.CauseUnavailable, "connection refused", "recovery identity")
}

// TestNoOldTLS: neither side speaks less than TLS 1.3.
func TestNoOldTLS(t *testing.T) {
	r := newRig(t)
	c, err := tls.Dial("tcp", r.address, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"}})
	if err == nil {
		c.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "protocol version") {
		t.Errorf("the server speaks TLS 1.2: %v", err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{r.options.Certificate}, MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.(*tls.Conn).Handshake()
			c.Close()
		}
	}()
	r.refused("a verifier with TLS 1.2", r.ask(r.client(func(c *ClientConfig) { c.Address = l.Addr().String() })), seal.CauseUnavailable, "protocol version")
}

// TestClientConfig: each complete way to recognise a verifier is accepted, and no
// incomplete one.
func TestClientConfig(t *testing.T) {
	digest := Digest([]byte("certificate"))
	for what, c := range map[string]ClientConfig{
		"no port": {Address: "verifier", Certificate: digest}, "nothing": {Address: "v:1"}, "no name": {Address: "v:1", CAFile: "/ca"}, "no CA": {Address: "v:1", ServerName: "v"},
		"both": {Address: "v:1", Certificate: digest, CAFile: "/ca", ServerName: "v"}, "short": {Address: "v:1", Certificate: digest[:70]}, "bare": {Address: "v:1", Certificate: digest[7:]},
		"no hexadecimal": {Address: "v:1", Certificate: "sha256:" + strings.Repeat("x", 64)},
	} {
		if _, err := NewClient(c); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
}

// TestEveryCheckHasAHint: kleidi has its own hint for every check.
func TestEveryCheckHasAHint(t *testing.T) {
	for _, c := range remote.Checks() {
		if hintOf(string(c)) == hintAsk {
			t.Errorf("no hint for a refusal by the check of the %s", c)
		}
	}
	if len(hints) != len(remote.Checks()) {
		t.Errorf("%d hints for %d checks", len(hints), len(remote.Checks()))
	}
}
