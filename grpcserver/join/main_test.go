package join

import (
	"context"
	"crypto"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	protocol "github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/attest/joinproof"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

var cluster = seal.ClusterID{7}

// rig is a machine that wants to join, and a node that gives the KEK and listens on
// loopback. It is the server's Host.
type rig struct {
	*testing.T
	machine *tpmtest.Machine
	wrapper *tpm.Wrapper
	terms   joinproof.Terms
	policy  *bootpolicy.BootPolicy
	ek      string
	server  *Server
	address string
	log     *buffer

	mu       sync.Mutex
	keyring  *keyring.Keyring
	events   []string // the calls of the host and of the record, in their order
	verdicts []*Verdict
	noRecord error
	noAdmit  error
	seen     Seen // what the server last demanded of the host
	clock    time.Time

	// Changes of J's messages by an intruder, or by a broken machine.
	hello    func(*joinproof.Hello)
	evidence func(*protocol.Evidence)
	pause    func() // after the grant
	mac      func([]byte) []byte
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
	r := &rig{T: t, machine: m, log: &buffer{}, clock: time.Now()}
	counter, err := nv.NewCounter(nv.DefaultEpochIndex, keys.Owner{})
	if err != nil {
		t.Fatal(err)
	}
	r.wrapper = tpm.NewWrapper(tpm.Config{Device: m.TPM(), Counter: counter, Node: "beta"})
	if r.ek, err = r.wrapper.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	epoch, err := r.wrapper.Epoch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r.terms = joinproof.Terms{Formats: keyring.Formats(), Bank: crypto.SHA256, PCRs: []int{4, 7, 11}, EpochIndex: nv.DefaultEpochIndex, Epoch: epoch}
	log, err := r.logs().Read()
	if err != nil {
		t.Fatal(err)
	}
	if r.policy, err = bootpolicy.Record(log, crypto.SHA256, []int{0, 4, 7, 11}); err != nil {
		t.Fatal(err)
	}
	r.keyring = seat(t)
	t.Cleanup(func() { r.keyring.Close() })
	o := Options{Host: r, Record: r.record, Log: slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug})), Timeout: 2 * time.Minute, hello: time.Minute, proof: 2 * time.Minute, now: r.now}
	for _, f := range change {
		f(&o)
	}
	if r.server, err = NewServer(o); err != nil {
		t.Fatal(err)
	}
	r.address = serve(t, r.server)
	r.approve()
	return r
}

// seat is a keyring of format 2, of one node without a TPM.
func seat(t *testing.T) *keyring.Keyring {
	t.Helper()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	node := keyring.Node{Name: "alpha"}
	first, err := keyring.New(cluster, kek, []seal.Slot{{Type: "recovery", Data: []byte("{}")}}, []keyring.Node{node}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	k, err := first.Upgrade(node)
	if err != nil {
		t.Fatal(err)
	}
	return k
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

func (r *rig) logs() attest.Logs {
	return attest.Logs{Firmware: r.machine.EventLog(), Userspace: r.machine.UserspaceLog()}
}

func (r *rig) now() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.clock
}

func (r *rig) pass(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.clock = r.clock.Add(d)
}

// approve approves the machine as node beta.
func (r *rig) approve(files ...SecretFile) *Approval {
	r.Helper()
	a := &Approval{Node: "beta", Expires: time.Hour, Files: files, Approval: joinproof.Approval{EK: r.ek, BootPolicy: r.policy}}
	if err := r.server.Approve(a); err != nil {
		r.Fatal(err)
	}
	return a
}

func (r *rig) record(v ...*Verdict) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, v := range v {
		event := "refused " + v.Check
		if v.Join != nil {
			event = "recorded " + v.Join.Step
		}
		r.events = append(r.events, event)
	}
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

func (r *rig) said() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.events, ", ")
}

// Verifier implements Host.
func (r *rig) Verifier() (*joinproof.Verifier, error) {
	return &joinproof.Verifier{Cluster: cluster, Format: 2}, nil
}

// Admit implements Host.
func (r *rig) Admit(_ context.Context, p *joinproof.Proven, seen Seen) (*Admission, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = seen
	if r.noAdmit != nil {
		return nil, r.noAdmit
	}
	n := keyring.Node{Name: p.Peer.Node, EK: p.Peer.EK, SRK: p.Peer.SRK, EpochIndex: p.Peer.Epoch.Index()}
	next, err := r.keyring.WithNode(n, time.Now())
	if err != nil {
		return nil, err
	}
	r.keyring.Close()
	r.keyring = next
	slot, err := tpm.WrapFor(p.Peer, next.KEK(), p.State, p.Epoch)
	if err != nil {
		return nil, err
	}
	r.events = append(r.events, "listed")
	return &Admission{Grant: Grant{Keyring: next.Shared(), Current: []seal.Slot{slot}}, Node: n, KeyID: next.CurrentID(), Revision: next.Revision(), Done: next.JoinDone}, nil
}

// join runs one whole join.
func (r *rig) join(change ...func(address, certificate *string)) (*Grant, error) {
	address, certificate := r.address, r.server.Certificate()
	for _, f := range change {
		f(&address, &certificate)
	}
	client, err := NewClient(address, certificate)
	if err != nil {
		r.Fatal(err)
	}
	var s *Session
	defer func() {
		if s != nil {
			s.Close()
		}
	}()
	a := &joinproof.Attester{Device: r.machine.TPM(), Logs: r.logs().Explaining}
	e, transcript, err := a.Prove(r.Context(), cluster, "beta", r.terms, func(h *joinproof.Hello) (c *protocol.Challenge, exporter []byte, err error) {
		sent := *h
		if r.hello != nil {
			r.hello(&sent)
		}
		if s, c, err = client.Begin(r.Context(), &sent); err != nil {
			return nil, nil, err
		}
		exporter, err = s.Exporter()
		return c, exporter, err
	})
	if err != nil {
		return nil, err
	}
	if r.evidence != nil {
		r.evidence(e)
	}
	g, err := s.Prove(e)
	if err != nil {
		return nil, err
	}
	if r.pause != nil {
		r.pause()
	}
	return g, r.finish(s, g, transcript)
}

// finish opens the grant as J does, and reports that to V.
func (r *rig) finish(s *Session, g *Grant, transcript []byte) error {
	u, err := keyring.Parse(g.Keyring)
	if err != nil {
		return err
	}
	kek, err := r.wrapper.Unwrap(r.Context(), g.Current[0])
	if err != nil {
		return err
	}
	k, err := u.Open(kek, nil)
	if err != nil {
		return err
	}
	defer k.Close()
	mac := k.JoinDone(transcript)
	if r.mac != nil {
		mac = r.mac(mac)
	}
	return s.Done(mac)
}

// undisturbed removes the changes.
func (r *rig) undisturbed() { r.hello, r.evidence, r.pause, r.mac = nil, nil, nil, nil }

// refused demands that the join fails for a reason.
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

// joins demands that the machine joins.
func (r *rig) joins(what string) *Grant {
	r.Helper()
	r.undisturbed()
	g, err := r.join()
	if err != nil {
		r.Errorf("%s: %v", what, err)
	}
	return g
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
