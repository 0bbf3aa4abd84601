package join

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/beezy-dev/kleidi/grpcserver/internal/exchange"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	protocol "github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/attest/joinproof"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// TestOrder: the node is listed and the audit record is flushed before the grant leaves,
// and the approval is spent by the proof that the keyring is open.
func TestOrder(t *testing.T) {
	r := newRig(t)
	before := ""
	if all := r.server.Unfinished(); len(all) != 0 {
		t.Errorf("an approval that nobody has used counts as unfinished: %v", all)
	}
	r.pause = func() {
		if before = r.said(); !r.server.Unfinished()["beta"] {
			t.Error("a node that is listed, and has not finished, does not count as unfinished")
		}
	}
	g, err := r.join()
	if err != nil {
		t.Fatal(err)
	}
	if all := r.server.Unfinished(); len(all) != 0 {
		t.Errorf("a node that has finished counts as unfinished: %v", all)
	}
	if before != "listed, recorded granted" || r.said() != "listed, recorded granted, recorded done" {
		t.Errorf("before the grant %q, in all %q", before, r.said())
	}
	if len(g.Current) != 1 || g.Current[0].Node != "beta" || len(g.Files) != 0 || bytes.Contains(g.Keyring, []byte(`"section"`)) {
		t.Errorf("%+v", g)
	}
	granted, done := r.verdicts[0], r.verdicts[1]
	if !granted.Accepted || granted.Node != "beta" || granted.EK != r.ek || len(granted.PCRs) != 4 || granted.Join.Revision != r.keyring.Revision() || granted.Join.KeyID != r.keyring.CurrentID() ||
		!strings.HasPrefix(granted.Join.BootPolicy, "sha256:") || !strings.HasPrefix(granted.Peer, "127.0.0.1:") || done.Join.Step != "done" || done.Node != "beta" {
		t.Errorf("%+v, %+v", granted, done)
	}
}

// TestApprovals: each way in which an approval is not valid, with its own reason.
func TestApprovals(t *testing.T) {
	r := newRig(t)
	r.hello = func(h *joinproof.Hello) { h.Node = "gamma" }
	_, err := r.join()
	r.refused("the right EK under another name", err, seal.CauseAttestation, "is not approved")
	r.undisturbed()
	if err := r.server.Approve(&Approval{Node: "gamma", Expires: time.Hour, Approval: joinproof.Approval{EK: "sha256:other", BootPolicy: r.policy}}); err != nil {
		t.Fatal(err)
	}
	r.hello = func(h *joinproof.Hello) { h.Node = "gamma" }
	_, err = r.join()
	r.refused("an unapproved EK", err, seal.CauseAttestation, "endorsement key: ", "another endorsement key")
	r.undisturbed()
	r.pass(time.Hour)
	_, err = r.join()
	r.refused("an expired approval", err, seal.CauseAttestation, "has expired")
	if v := r.lastVerdict(); v.Accepted || v.Check != string(protocol.CheckNode) || v.Node != "beta" {
		t.Errorf("%+v", v)
	}
	r.approve()
	r.joins("a fresh approval")
	_, err = r.join()
	r.refused("a second use", err, seal.CauseAttestation, "was used: the node has joined")
	if strings.Count(r.said(), "listed") != 1 {
		t.Error(r.said())
	}
	r.approve()
	r.joins("approved once more")
}

// TestOneName: a machine is approved under one name, until that approval is used, withdrawn
// or expired.
func TestOneName(t *testing.T) {
	r := newRig(t)
	approve := func(name string) error {
		return r.server.Approve(&Approval{Node: name, Expires: time.Hour, Approval: joinproof.Approval{EK: r.ek, BootPolicy: r.policy}})
	}
	refused := func(what string) {
		t.Helper()
		err := approve("gamma")
		if err == nil || !strings.HasPrefix(err.Error(), "the machine with that endorsement key is approved as node beta; ") ||
			!strings.Contains(err.Error(), "run kleidi node approve beta --ek "+r.ek+"), or withdraw that approval first: run kleidi node remove beta") {
			t.Errorf("%s: %v", what, err)
		}
		if all := r.server.Unused(); len(all) != 1 || all[0].Node != "beta" {
			t.Errorf("%s: %+v", what, all)
		}
	}
	refused("approved as beta")
	r.approve()
	refused("approved as beta again")
	r.server.Forget("beta")
	if err := approve("gamma"); err != nil {
		t.Errorf("withdrawn: %v", err)
	}
	r.server.Forget("gamma")
	r.approve()
	r.pass(2 * time.Hour)
	if err := approve("gamma"); err != nil {
		t.Errorf("expired: %v", err)
	}
	r.server.Forget("gamma")
	r.approve()
	r.joins("as beta")
	if err := approve("gamma"); err != nil {
		t.Errorf("used: the keyring, and not the approval, says which machines are nodes: %v", err)
	}
}

// TestAdmitRefuses: the machine learns why the keyring does not list it.
func TestAdmitRefuses(t *testing.T) {
	r := newRig(t)
	r.noAdmit = protocol.Refuse(protocol.CheckEK, "remove it first", "it is node gamma already")
	_, err := r.join()
	r.refused("listed under another name", err, seal.CauseAttestation, "endorsement key: ", "it is node gamma already")
	if v := r.lastVerdict(); v.Accepted || v.Check != string(protocol.CheckEK) || v.Hint != "remove it first" {
		t.Errorf("%+v", v)
	}
	r.noAdmit = nil
	r.joins("once it is removed")
}

// TestExpiresMeanwhile: an approval that runs out, or is replaced, during a join ends it.
func TestExpiresMeanwhile(t *testing.T) {
	r := newRig(t)
	r.evidence = func(*protocol.Evidence) { r.pass(2 * time.Hour) }
	_, err := r.join()
	r.refused("it ran out", err, seal.CauseAttestation, "has expired")
	r.approve()
	r.evidence = func(*protocol.Evidence) { r.approve() }
	_, err = r.join()
	r.refused("it was replaced", err, seal.CauseAttestation, "was replaced meanwhile")
	r.undisturbed()
	for what, c := range map[string]struct {
		happens func()
		words   string
	}{
		"it ran out while the logs came":   {func() { r.pass(2 * time.Hour) }, "has expired"},
		"it was replaced while they came":  {func() { r.approve() }, "was replaced meanwhile"},
		"it was withdrawn while they came": {func() { r.server.Forget("beta") }, "was withdrawn meanwhile"},
	} {
		r.approve()
		s, e := r.proveOnly()
		c.happens()
		_, err := s.sendLogs(e)
		r.refused(what, s.failed(err), seal.CauseAttestation, c.words)
		s.Close()
	}
	if strings.Contains(r.said(), "listed") {
		t.Error(r.said())
	}
	r.approve()
	r.joins("by the newest")
}

// TestBrokenOff: if a join breaks off after the grant, only the same machine can run it
// again, until that machine shows that it has opened the keyring.
func TestBrokenOff(t *testing.T) {
	r := newRig(t)
	r.mac = func(mac []byte) []byte { mac[0] ^= 1; return mac }
	_, err := r.join()
	r.refused("another proof of the opened keyring", err, seal.CauseAttestation, string(CheckDone), "does not show")
	if !r.server.Unfinished()["beta"] {
		t.Error("the node is not shown as unfinished")
	}
	r.mac = func([]byte) []byte { return nil }
	_, err = r.join()
	r.refused("none", err, seal.CauseAttestation, string(CheckDone))
	r.undisturbed()
	r.terms.EpochIndex++
	_, err = r.join()
	r.refused("with another epoch index", err, seal.CauseAttestation, "used with another storage root key or epoch index")
	r.terms.EpochIndex--
	r.joins("the same machine")
	if len(r.server.Unfinished()) != 0 {
		t.Error("the node has finished")
	}
}

// TestListedMeanwhile: the host is told which entry the keyring must have: what the operator
// saw, and once the machine is listed, that machine. A refusal by that demand ends the
// approval, with its files.
func TestListedMeanwhile(t *testing.T) {
	r := newRig(t)
	seen := Seen{Entry: &keyring.Node{Name: "beta", EK: "another"}, KeyID: "k1", Former: true}
	token, err := seal.Memory{}.Take([]byte("token"))
	if err != nil {
		t.Fatal(err)
	}
	a := &Approval{Node: "beta", Expires: time.Hour, Seen: seen, Files: []SecretFile{{Name: "token", Content: token}}, Approval: joinproof.Approval{EK: r.ek, BootPolicy: r.policy}}
	if err := r.server.Approve(a); err != nil {
		t.Fatal(err)
	}
	r.mac = func([]byte) []byte { return nil }
	_, err = r.join()
	r.refused("not done", err, seal.CauseAttestation, string(CheckDone))
	if r.seen != seen {
		t.Errorf("at first: %+v", r.seen)
	}
	r.noAdmit = protocol.Refuse(protocol.CheckEK, "see node list", "no longer")
	_, err = r.join()
	r.refused("for another reason", err, seal.CauseAttestation, "no longer")
	if e := r.seen.Entry; e == nil || e.EK != r.ek || e.EpochIndex != r.terms.EpochIndex || len(r.server.Unfinished()) != 1 {
		t.Errorf("once it is listed: %+v, unfinished %v", r.seen, r.server.Unfinished())
	}
	r.noAdmit = protocol.Refuse(protocol.CheckNode, "approve it again", "it was removed")
	_, err = r.join()
	r.refused("removed", err, seal.CauseAttestation, "it was removed")
	r.noAdmit = nil
	_, err = r.join()
	r.refused("after that", err, seal.CauseAttestation, "is not approved")
	kept := false
	token.With(func(b []byte) { kept = b != nil })
	if len(r.server.Unfinished()) != 0 || kept {
		t.Errorf("unfinished %v, or the file is still there", r.server.Unfinished())
	}
	r.approve()
	r.joins("approved again")
}

// TestAttacks makes some attacks over the wire; package joinproof tests all of them,
// one by one.
func TestAttacks(t *testing.T) {
	r := newRig(t)
	var kept *protocol.Evidence
	r.evidence = func(e *protocol.Evidence) { c := *e; kept = &c }
	r.noAdmit = errors.New("no disk")
	_, err := r.join()
	r.refused("the node can't be listed", err, seal.CauseUnavailable, "can't list this node", "see the log")
	r.noAdmit = nil
	for name, c := range map[string]struct {
		hello    func(*joinproof.Hello)
		evidence func(*protocol.Evidence)
		check    protocol.Check
	}{
		"replayed evidence":   {evidence: func(e *protocol.Evidence) { *e = *kept }, check: protocol.CheckProof},
		"a replayed quote":    {evidence: func(e *protocol.Evidence) { e.Attest, e.Signature = kept.Attest, kept.Signature }, check: protocol.CheckEvidence},
		"a cut log":           {evidence: func(e *protocol.Evidence) { e.FirmwareLog = e.FirmwareLog[:len(e.FirmwareLog)-1] }, check: protocol.CheckEvidence},
		"altered terms":       {hello: func(h *joinproof.Hello) { h.Epoch++ }, check: protocol.CheckProof},
		"another cluster":     {hello: func(h *joinproof.Hello) { h.Cluster = make([]byte, 16) }, check: protocol.CheckCluster},
		"an older format":     {hello: func(h *joinproof.Hello) { h.Formats = []int{1} }, check: joinproof.CheckFormat},
		"a verifier's demand": {hello: func(h *joinproof.Hello) { h.Verifier = []byte("key") }, check: joinproof.CheckVerifier},
	} {
		r.hello, r.evidence = c.hello, c.evidence
		_, err := r.join()
		r.refused(name, err, seal.CauseAttestation, string(c.check)+": ")
		if v := r.lastVerdict(); v.Accepted || v.Check != string(c.check) {
			t.Errorf("%s: %+v", name, v)
		}
	}
	if strings.Contains(r.said(), "listed") {
		t.Error(r.said())
	}
	b := simboot.Baseline(simboot.UKI)
	b.CommandLine = "init=/bin/sh"
	r.undisturbed()
	r.machine.Reboot(b)
	_, err = r.join()
	r.refused("another boot", err, seal.CauseBootPolicy, "the boot policy refuses this boot")
	r.machine.Reboot(simboot.Baseline(simboot.UKI))
	r.joins("undisturbed, after all of them")
}

// TestNoRecordNoGrant: without the audit log the answer is no, although the node is listed.
func TestNoRecordNoGrant(t *testing.T) {
	r := newRig(t)
	r.noRecord = errors.New("no space left on device")
	g, err := r.join()
	r.refused("no record", err, seal.CauseUnavailable, "can't write its audit log", "see the log")
	if g != nil || r.said() != "listed, recorded granted" {
		t.Errorf("%v, %s", g, r.said())
	}
	r.noRecord = nil
	r.joins("once it can be written")
}

// TestOneAtATime: a node that stops half-way holds its own approval until it goes away.
func TestOneAtATime(t *testing.T) {
	r := newRig(t, func(o *Options) { o.Timeout = 5 * time.Minute })
	s, _ := r.proveOnly()
	_, err := r.join()
	r.refused("meanwhile", err, seal.CauseUnavailable, "another join of this node is in progress")
	s.Close()
	r.eventually("the place is free", func() bool { _, err = r.join(); return err == nil })
}

// TestHoldsItsPlace: a node that stops half-way and stays loses the approval when its time
// is over.
func TestHoldsItsPlace(t *testing.T) {
	r := newRig(t, func(o *Options) { o.Timeout = 30 * time.Second })
	s, _ := r.proveOnly()
	defer s.Close()
	if _, err := s.receive(); status.Code(err) != codes.DeadlineExceeded && status.Code(err) != codes.Canceled {
		t.Errorf("it goes on: %v", err)
	}
	r.eventually("the place is free", func() bool { _, err := r.join(); return err == nil })
}

// proveOnly begins a join that has sent its proof, holds its approval, and has not sent its
// logs.
func (r *rig) proveOnly() (s *Session, e *protocol.Evidence) {
	r.Helper()
	client, err := NewClient(r.address, r.server.Certificate())
	if err != nil {
		r.Fatal(err)
	}
	a := &joinproof.Attester{Device: r.machine.TPM(), Logs: r.logs().Explaining}
	e, _, err = a.Prove(r.Context(), cluster, "beta", r.terms, func(h *joinproof.Hello) (c *protocol.Challenge, exporter []byte, err error) {
		if s, c, err = client.Begin(r.Context(), h); err == nil {
			exporter, err = s.Exporter()
		}
		return c, exporter, err
	})
	if err != nil {
		r.Fatal(err)
	}
	if err := s.send(fromEvidence(e)); err != nil {
		r.Fatal(err)
	}
	r.eventually("the place is taken", func() bool {
		r.server.approvals.mu.Lock()
		defer r.server.approvals.mu.Unlock()
		return r.server.approvals.all["beta"].busy
	})
	return s, e
}

// TestFiles: the files travel in the grant, and disappear from memory with the approval.
func TestFiles(t *testing.T) {
	r := newRig(t)
	secret := func(s string) SecretFile {
		content, err := seal.Memory{}.Take([]byte(s))
		if err != nil {
			t.Fatal(err)
		}
		return SecretFile{Name: "join.yaml", Content: content}
	}
	gone := func(f SecretFile) bool {
		size := 0
		f.Content.With(func(b []byte) { size = len(b) })
		return size == 0
	}
	first, second, third := secret("token 1"), secret("token 2"), secret("token 3")
	r.approve(first)
	r.approve(second)
	if !gone(first) || gone(second) {
		t.Error("the files of a replaced approval stay, or those of the present one are gone")
	}
	r.noRecord = errors.New("full")
	if _, err := r.join(); err == nil {
		t.Error("without a record")
	}
	r.noRecord = nil
	g := r.joins("with a file")
	if len(g.Files) != 1 || g.Files[0].Name != "join.yaml" || string(g.Files[0].Content) != "token 2" || !gone(second) {
		t.Errorf("%+v, gone: %v", g.Files, gone(second))
	}
	if v := r.verdicts[len(r.verdicts)-2]; len(v.Join.Files) != 1 || v.Join.Files[0] != "join.yaml" {
		t.Errorf("%+v", v.Join)
	}
	if strings.Contains(r.log.String(), "token") {
		t.Error("a token is in the log")
	}
	a := &Approval{Node: "beta", Expires: time.Millisecond, Files: []SecretFile{third}, Approval: joinproof.Approval{EK: r.ek, BootPolicy: r.policy}}
	if err := r.server.Approve(a); err != nil {
		t.Fatal(err)
	}
	r.eventually("an expired approval keeps no file", func() bool { return gone(third) })
}

// TestTrust: J talks only to the node with the certificate that the operator named.
func TestTrust(t *testing.T) {
	r := newRig(t)
	other := certificate(t)
	_, err := r.join(func(_, c *string) { *c = exchange.Digest(other.Certificate[0]) })
	r.refused("another certificate", err, seal.CauseUnavailable, "not the one that is configured", "somebody is intercepting the connection")
	_, err = r.join(func(a, _ *string) { *a = "127.0.0.1:1" })
	r.refused("nobody there", err, seal.CauseUnavailable, "connection refused", "join.listen")
	if len(r.verdicts) != 0 {
		t.Error("the node that gives the KEK heard of it")
	}
	for _, c := range [][2]string{{"host", r.server.Certificate()}, {"h:1", "sha256:00"}, {"h:1", strings.Repeat("0", 64)}} {
		if _, err := NewClient(c[0], c[1]); err == nil {
			t.Errorf("%v: accepted", c)
		}
	}
	if a, b := r.server.Certificate(), exchange.Digest(certificate(t).Certificate[0]); a == b || len(a) != 71 {
		t.Errorf("two processes have the certificate %s", a)
	}
}

func certificate(t *testing.T) tls.Certificate {
	t.Helper()
	c, err := newCertificate()
	if err != nil {
		t.Fatal(err)
	}
	return *c
}

// TestRelay: even a relay with a certificate that J trusts can't intercept a join.
func TestRelay(t *testing.T) {
	r := newRig(t)
	forged := certificate(t)
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{forged}, MinVersion: tls.VersionTLS13})))
	relay := func(_ any, down grpc.ServerStream) error {
		conn, err := grpc.NewClient("passthrough:///"+r.address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})))
		if err != nil {
			return err
		}
		defer conn.Close()
		up, err := exchange.Open(down.Context(), conn, service)
		if err != nil {
			return err
		}
		go func() {
			for m := new(FromJoiner); down.RecvMsg(m) == nil; m = new(FromJoiner) {
				_ = up.SendMsg(m)
			}
			_ = up.CloseSend()
		}()
		for {
			m := new(FromVerifier)
			if up.RecvMsg(m) != nil {
				return nil
			}
			if err := down.SendMsg(m); err != nil {
				return err
			}
		}
	}
	s.RegisterService(&grpc.ServiceDesc{ServiceName: serviceName, Streams: []grpc.StreamDesc{{StreamName: methodName, Handler: relay, ServerStreams: true, ClientStreams: true}}}, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	_, err = r.join(func(a, c *string) { *a, *c = l.Addr().String(), exchange.Digest(forged.Certificate[0]) })
	r.refused("a relayed session", err, seal.CauseAttestation, "proof: ", "somebody is intercepting the connection")
	if v := r.lastVerdict(); v.Finding != string(protocol.FindingOtherTranscript) || strings.Contains(err.Error(), v.Finding) {
		t.Errorf("%+v; the relay learns %v", v, err)
	}
	if strings.Contains(r.said(), "listed") {
		t.Error(r.said())
	}
	r.joins("without it")
}

// TestHostileClients: a message that no kleidi sends ends the join, and nothing else.
func TestHostileClients(t *testing.T) {
	r := newRig(t)
	var hello *FromJoiner
	r.hello = func(h *joinproof.Hello) { hello = fromHello(h) }
	r.noAdmit = errors.New("not now")
	_, _ = r.join()
	r.noAdmit = nil
	for name, c := range map[string]struct {
		send []*FromJoiner
		code codes.Code
	}{
		"nothing":           {[]*FromJoiner{{}}, codes.InvalidArgument},
		"a statement first": {[]*FromJoiner{fromEvidence(&protocol.Evidence{})}, codes.InvalidArgument},
		"done first":        {[]*FromJoiner{{Message: &FromJoiner_Done{&Done{}}}}, codes.InvalidArgument},
		"two hellos":        {[]*FromJoiner{hello, hello}, codes.InvalidArgument},
		"a log, no proof":   {[]*FromJoiner{hello, fromPart(&exchange.LogPart{Firmware: []byte{1}})}, codes.InvalidArgument},
		"a huge hello":      {[]*FromJoiner{fromHello(&joinproof.Hello{Node: strings.Repeat("x", exchange.MaxMessage)})}, codes.ResourceExhausted},
	} {
		s := r.raw()
		for _, m := range c.send {
			_ = s.SendMsg(m)
		}
		var err error
		for m := new(FromVerifier); err == nil; m = new(FromVerifier) {
			err = s.RecvMsg(m)
		}
		if status.Code(err) != c.code {
			t.Errorf("%s: %v, want %v", name, err, c.code)
		}
	}
	r.joins("an honest one, afterwards")
	if strings.Contains(r.log.String(), "panic") {
		t.Error(r.log)
	}
}

func (r *rig) raw() grpc.ClientStream {
	r.Helper()
	conn, err := exchange.Dial(r.address, &tls.Config{InsecureSkipVerify: true}, maxGrant)
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { conn.Close() })
	s, err := exchange.Open(r.Context(), conn, service)
	if err != nil {
		r.Fatal(err)
	}
	return s
}

// TestHostileVerifier: V's text is bounded and printable, and nonsense is not accepted
// as a grant.
func TestHostileVerifier(t *testing.T) {
	var say []*FromVerifier
	cert := certificate(t)
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13})))
	s.RegisterService(&grpc.ServiceDesc{ServiceName: serviceName, Streams: []grpc.StreamDesc{{StreamName: methodName, ServerStreams: true, ClientStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
		for _, m := range say {
			if err := stream.SendMsg(m); err != nil {
				return err
			}
		}
		return nil
	}}}}, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ek, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	nasty := strings.Repeat("\x1b[31m\n", 5000)
	grant := func(change func(*GrantMessage)) []*FromVerifier {
		m := &GrantMessage{Keyring: []byte("k"), Current: []*Slot{{Type: "tpm", Node: "beta", Data: []byte("{}")}}}
		change(m)
		return []*FromVerifier{fromChallenge(&protocol.Challenge{}), {Message: &FromVerifier_Grant{m}}}
	}
	for name, c := range map[string]struct {
		say   []*FromVerifier
		words string
	}{
		"nothing":                {nil, "ended the join"},
		"a grant first":          {grant(func(*GrantMessage) {})[1:], "out of order"},
		"a nasty refusal":        {[]*FromVerifier{{Message: &FromVerifier_Refusal{&exchange.Refusal{Check: nasty, Reason: nasty, Hint: nasty}}}}, "it refuses"},
		"no keyring":             {grant(func(m *GrantMessage) { m.Keyring = nil }), "no keyring"},
		"no slot":                {grant(func(m *GrantMessage) { m.Current = nil }), "no slot"},
		"a slot of another node": {grant(func(m *GrantMessage) { m.Current[0].Node = "gamma" }), "of another node"},
		"a huge slot":            {grant(func(m *GrantMessage) { m.Current[0].Data = make([]byte, seal.MaxSlotData+1) }), "too large"},
		"a path":                 {grant(func(m *GrantMessage) { m.Bootstrap = []*BootstrapFile{{Name: "../x"}} }), "bootstrap file"},
		"a hidden file":          {grant(func(m *GrantMessage) { m.Bootstrap = []*BootstrapFile{{Name: ".x"}} }), "bootstrap file"},
		"two of one name":        {grant(func(m *GrantMessage) { m.Bootstrap = []*BootstrapFile{{Name: "x"}, {Name: "x"}} }), "two bootstrap files"},
		"a huge file":            {grant(func(m *GrantMessage) { m.Bootstrap = []*BootstrapFile{{Name: "x", Content: make([]byte, MaxFiles+1)}} }), "at most"},
		"a huge grant":           {grant(func(m *GrantMessage) { m.Keyring = make([]byte, maxGrant) }), "larger than max"},
	} {
		say = c.say
		client, err := NewClient(l.Addr().String(), exchange.Digest(cert.Certificate[0]))
		if err != nil {
			t.Fatal(err)
		}
		s, _, err := client.Begin(t.Context(), &joinproof.Hello{Node: "beta", EK: ek})
		if err == nil {
			_, err = s.Prove(&protocol.Evidence{})
			s.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.words) || strings.ContainsAny(err.Error(), "\x1b\n") || len(err.Error()) > 4*(exchange.MaxReason+exchange.MaxHint) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestManyApprovals: the number of approvals in memory is bounded.
func TestManyApprovals(t *testing.T) {
	b := newApprovals(time.Now)
	t.Cleanup(b.close)
	put := func(name string) error {
		return b.put(&Approval{Node: name, Expires: time.Hour, Approval: joinproof.Approval{EK: "sha256:" + name}})
	}
	for i := range maxApprovals {
		if err := put(fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := put("one more"); err == nil {
		t.Error("there is no end")
	}
	if err := put("7"); err != nil {
		t.Errorf("in the place of a former one: %v", err)
	}
}

// TestEveryCheckHasAHint: kleidi has its own hint for every check.
func TestEveryCheckHasAHint(t *testing.T) {
	for _, c := range append(joinproof.Checks(), CheckDone) {
		if hints[c] == "" {
			t.Errorf("no hint for a refusal by the check of the %s", c)
		}
	}
	if len(hints) != len(joinproof.Checks())+1 {
		t.Errorf("%d hints for %d checks", len(hints), len(joinproof.Checks())+1)
	}
}

// wireVectors are the messages of a join, byte by byte, because nodes of different
// versions talk to each other.
var wireVectors = map[string]string{
	"hello":     "0a610a10010101010101010101010101010101011204626574611a05020202020222060303030303032a0704040404040404320805050505050505053a02010242067368613235364a0304070b508196810c5803620206066a03070707720408080808",
	"challenge": "121b0a0301010112030202021a0303030322067368613235362a020407",
	"last part": "22070a030101011801",
	"grant":     "2a3b0a0901010101010101010112110a0374706d1204626574611a04020202021a110a0374706d1204626574611a040303030322080a01661203040404",
	"done":      "32060a0401010101",
	"finished":  "3a00",
	"refusal":   "421b0a046e6f64651207756e6b6e6f776e1a0a617070726f7665206974",
}

// TestWireVectors: no byte that crosses the wire changes within a version.
func TestWireVectors(t *testing.T) {
	fill := func(first byte, n int) []byte { return bytes.Repeat([]byte{first}, n) }
	hello := &joinproof.Hello{Cluster: fill(1, 16), Node: "beta", EK: fill(2, 5), EKCertificate: fill(3, 6), AK: fill(4, 7), SRK: fill(5, 8),
		Terms: joinproof.Terms{Formats: []int{1, 2}, Bank: 5, PCRs: []int{4, 7, 11}, EpochIndex: 0x1804b01, Epoch: 3, Verifier: fill(6, 2), Signer: fill(7, 3), Ref: fill(8, 4)}}
	grant := &Grant{Keyring: fill(1, 9), Current: []seal.Slot{{Type: "tpm", Node: "beta", Data: fill(2, 4)}}, Staged: []seal.Slot{{Type: "tpm", Node: "beta", Data: fill(3, 4)}}, Files: []File{{Name: "f", Content: fill(4, 3)}}}
	messages := map[string]proto.Message{
		"hello": fromHello(hello), "challenge": fromChallenge(&protocol.Challenge{Nonce: fill(1, 3), Credential: fill(2, 3), Secret: fill(3, 3), Bank: 5, PCRs: []int{4, 7}}),
		"last part": fromPart(&exchange.LogPart{Firmware: fill(1, 3), Last: true}), "grant": fromGrant(grant),
		"done": &FromJoiner{Message: &FromJoiner_Done{&Done{Mac: fill(1, 4)}}}, "finished": &FromVerifier{Message: &FromVerifier_Finished{&Finished{}}},
		"refusal": &FromVerifier{Message: &FromVerifier_Refusal{&exchange.Refusal{Check: "node", Reason: "unknown", Hint: "approve it"}}},
	}
	for name, m := range messages {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if got := hex.EncodeToString(b); err != nil || got != wireVectors[name] {
			t.Errorf("%s: %s, %v", name, got, err)
		}
		again := m.ProtoReflect().New().Interface()
		if err := proto.Unmarshal(b, again); err != nil || !proto.Equal(m, again) {
			t.Errorf("%s: it is read as %v, %v", name, again, err)
		}
	}
	if got := toHello(fromHello(hello).GetHello()); fmt.Sprint(got) != fmt.Sprint(hello) {
		t.Errorf("%+v", got)
	}
}
