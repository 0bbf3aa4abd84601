package joinproof

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

var cluster = seal.ClusterID{1, 2, 3}

const index = nv.DefaultEpochIndex + 6

// rig is a joining machine and a verifier that has approved it, with nothing between
// them but the attacker of a test.
type rig struct {
	*testing.T
	machine   *tpmtest.Machine
	verifier  *Verifier
	approvals map[string]*Approval
	terms     Terms
	wrapper   *tpm.Wrapper
	recent    exchange.Recent
	finding   exchange.Finding
	wire
}

// wire holds an intruder's changes of the messages.
type wire struct {
	exporter  []byte // on the joining side, if it differs
	machine   func(*exchange.Machine)
	claim     func(*Hello) // the joining side's own claims
	hello     func(*Hello) // the message that arrives
	challenge func(*exchange.Challenge)
	evidence  func(*exchange.Evidence)
}

func exporter(first byte) []byte {
	return append([]byte{first}, make([]byte, exchange.ExporterSize-1)...)
}

func newRig(t *testing.T, b simboot.Boot) *rig {
	t.Helper()
	m := tpmtest.New(t, b)
	counter, err := nv.NewCounter(index, keys.Owner{})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{T: t, machine: m, approvals: map[string]*Approval{}}
	r.wrapper = tpm.NewWrapper(tpm.Config{Device: m.TPM(), Counter: counter, Node: "beta"})
	ek, err := r.wrapper.Provision(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	epoch, err := r.wrapper.Epoch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r.terms = Terms{Formats: []int{1, 2}, Bank: crypto.SHA256, PCRs: []int{4, 7, 11}, EpochIndex: index, Epoch: epoch}
	r.approvals["beta"] = &Approval{EK: ek, BootPolicy: r.policy(0, 4, 7, 11)}
	r.verifier = &Verifier{Cluster: cluster, Format: 2, Approval: func(node string) *Approval { return r.approvals[node] }}
	return r
}

func (r *rig) logs() attest.Logs {
	return attest.Logs{Firmware: r.machine.EventLog(), Userspace: r.machine.UserspaceLog()}
}

func (r *rig) policy(pcrs ...int) *bootpolicy.BootPolicy {
	r.Helper()
	log, err := r.logs().Read()
	if err != nil {
		r.Fatal(err)
	}
	p, err := bootpolicy.Record(log, crypto.SHA256, pcrs)
	if err != nil {
		r.Fatal(err)
	}
	return p
}

// join is one exchange. It returns the knowledge of both sides afterwards.
func (r *rig) join() (proven *Proven, theirs, ours []byte, err error) {
	err = r.machine.TPM().Do(r.Context(), func(t transport.TPM) error {
		return keys.WithSRK(t, keys.Owner{}, nil, func(srk *keys.SRK) error {
			return exchange.WithMachine(t, srk, func(m *exchange.Machine) error {
				if r.wire.machine != nil {
					r.wire.machine(m)
				}
				hello, err := NewHello(m, cluster, "beta", r.terms)
				if err != nil {
					return err
				}
				if r.claim != nil {
					r.claim(hello)
				}
				sent := *hello
				if r.hello != nil {
					r.hello(&sent)
				}
				pending, c, err := r.verifier.Challenge(&sent, exporter(1))
				if err != nil {
					return err
				}
				r.recent.Add(pending.Pending)
				if r.challenge != nil {
					r.challenge(c)
				}
				own := r.exporter
				if own == nil {
					own = exporter(1)
				}
				e, transcript, err := Respond(m, hello, c, own, r.logs().Explaining)
				if err != nil {
					return err
				}
				if r.evidence != nil {
					r.evidence(e)
				}
				if err := pending.Prove(e.Proof); err != nil {
					r.finding = r.recent.Find(pending.Pending, e)
					return err
				}
				theirs, ours = pending.Transcript(), transcript
				proven, err = pending.Judge(e)
				return err
			})
		})
	})
	return proven, theirs, ours, err
}

func (r *rig) refused(what string, check exchange.Check, words string) {
	r.Helper()
	_, _, _, err := r.join()
	refusal, ok := errors.AsType[*exchange.Refusal](err)
	if !ok || refusal.Check != check || !strings.Contains(err.Error(), words) || refusal.Hint == "" {
		r.Errorf("%s: %v, want a refusal by %q with %q", what, err, check, words)
	}
}

func (r *rig) accepted(what string) *Proven {
	r.Helper()
	r.wire = wire{}
	p, theirs, ours, err := r.join()
	if err != nil || !bytes.Equal(theirs, ours) || len(ours) != 32 {
		r.Fatalf("%s: %v", what, err)
	}
	return p
}

// TestJoin: the KEK is wrapped for the proven facts, and the node opens the resulting
// slot.
func TestJoin(t *testing.T) {
	r := newRig(t, simboot.Baseline(simboot.UKI))
	p := r.accepted("as approved")
	if p.Peer.Node != "beta" || p.Peer.EK != r.approvals["beta"].EK || p.Peer.Epoch.Index() != index || p.Epoch != r.terms.Epoch || len(p.State.Values) != 3 || len(p.Result.PCRs) != 4 {
		t.Errorf("%+v", p)
	}
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	slot, err := tpm.WrapFor(p.Peer, kek, p.State, p.Epoch)
	if err != nil {
		t.Fatal(err)
	}
	got, err := r.wrapper.Unwrap(t.Context(), slot)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !got.Equal(kek) {
		t.Error("it opens to another KEK")
	}
}

// TestAttacks: each attack is refused for its own reason.
func TestAttacks(t *testing.T) {
	r, other := newRig(t, simboot.Baseline(simboot.UKI)), newRig(t, simboot.Baseline(simboot.UKI))
	r.approvals["gamma"] = other.approvals["beta"]
	var kept *exchange.Evidence
	var keptNonce []byte
	r.wire = wire{evidence: func(e *exchange.Evidence) { kept = copyOf(e) }, challenge: func(c *exchange.Challenge) { keptNonce = bytes.Clone(c.Nonce) }}
	if _, _, _, err := r.join(); err != nil {
		t.Fatal(err)
	}
	unknown := spki(t)
	lend := func(e *exchange.Evidence) { // another TPM, after a good boot, quotes the right transcript
		a, err := tpm2.Unmarshal[tpm2.TPMSAttest](e.Attest)
		if err != nil {
			t.Fatal(err)
		}
		q, err := (keys.Quoter{Device: other.machine.TPM()}).Quote(t.Context(), nil, a.ExtraData.Buffer, crypto.SHA256, []int{0, 4, 7, 11})
		if err != nil {
			t.Fatal(err)
		}
		e.Attest, e.Signature, e.PCRs = q.Attest, q.Signature, q.PCRs
	}
	// What the verifier's log says of a proof that does not verify. Its answer does not.
	findings := map[string]exchange.Finding{
		"replayed evidence":              exchange.FindingReplay,
		"a stale nonce":                  exchange.FindingStaleNonce,
		"a proof of somebody else":       exchange.FindingNoSecret,
		"a relayed session":              exchange.FindingOtherTranscript,
		"the terms' PCRs altered":        exchange.FindingOtherTranscript,
		"the terms' epoch altered":       exchange.FindingOtherTranscript,
		"the terms' epoch index altered": exchange.FindingOtherTranscript,
		"the terms' formats altered":     exchange.FindingOtherTranscript,
		"another machine's SRK":          exchange.FindingOtherTranscript,
	}
	for name, c := range map[string]struct {
		wire  wire
		check exchange.Check
		words string
	}{
		"an unapproved node":               {wire{hello: func(h *Hello) { h.Node = "delta" }}, exchange.CheckNode, "not approved"},
		"the right EK under another name":  {wire{hello: func(h *Hello) { h.Node = "gamma" }}, exchange.CheckEK, "another endorsement key"},
		"an unapproved EK":                 {wire{hello: func(h *Hello) { h.EK = unknown }}, exchange.CheckEK, "another endorsement key"},
		"another cluster":                  {wire{hello: func(h *Hello) { h.Cluster = make([]byte, 16) }}, exchange.CheckCluster, "cluster 00"},
		"replayed evidence":                {wire{evidence: func(e *exchange.Evidence) { *e = *kept }}, exchange.CheckProof, "not on the TPM"},
		"a replayed quote":                 {wire{evidence: func(e *exchange.Evidence) { e.Attest, e.Signature = kept.Attest, kept.Signature }}, exchange.CheckEvidence, "not fresh"},
		"a quote from another TPM":         {wire{evidence: lend}, exchange.CheckEvidence, "quote"},
		"a proof of somebody else":         {wire{evidence: func(e *exchange.Evidence) { e.Proof[0] ^= 1 }}, exchange.CheckProof, "not on the TPM"},
		"a relayed session":                {wire{exporter: exporter(2)}, exchange.CheckProof, "is intercepting"},
		"a stale nonce":                    {wire{challenge: func(c *exchange.Challenge) { c.Nonce = keptNonce }}, exchange.CheckProof, "is intercepting"},
		"a forged log":                     {wire{evidence: func(e *exchange.Evidence) { cut(t, e) }}, exchange.CheckEvidence, "PCR"},
		"no log":                           {wire{evidence: func(e *exchange.Evidence) { e.FirmwareLog = nil }}, exchange.CheckEvidence, "firmware event log"},
		"fewer PCRs":                       {wire{challenge: func(c *exchange.Challenge) { c.PCRs = []int{4, 7} }}, exchange.CheckEvidence, "not over exactly"},
		"the terms' PCRs altered":          {wire{hello: func(h *Hello) { h.PCRs = []int{4, 7} }}, exchange.CheckProof, "is intercepting"},
		"the terms' epoch altered":         {wire{hello: func(h *Hello) { h.Epoch++ }}, exchange.CheckProof, "is intercepting"},
		"the terms' epoch index altered":   {wire{hello: func(h *Hello) { h.EpochIndex++ }}, exchange.CheckProof, "is intercepting"},
		"the terms' formats altered":       {wire{hello: func(h *Hello) { h.Formats = []int{2} }}, exchange.CheckProof, "is intercepting"},
		"another machine's SRK":            {wire{hello: func(h *Hello) { h.SRK = other.srk() }}, exchange.CheckProof, "is intercepting"},
		"another machine's SRK, claimed":   {wire{claim: func(h *Hello) { h.SRK = other.srk() }}, exchange.CheckSRK, "is not a child of it"},
		"an SRK of another template":       {wire{hello: func(h *Hello) { h.SRK = weaken(t, h.SRK) }}, exchange.CheckSRK, "not of the TCG's"},
		"an AK with wrong attributes":      {wire{hello: func(h *Hello) { h.AK = weaken(t, h.AK) }}, exchange.CheckAK, "not a restricted signing key"},
		"a format that it does not read":   {wire{claim: func(h *Hello) { h.Formats = []int{1} }}, CheckFormat, "of format 2"},
		"a remote verifier of its own":     {wire{claim: func(h *Hello) { h.Verifier = []byte("key") }}, CheckVerifier, "another remote verifier"},
		"a signer that nobody approved":    {wire{claim: func(h *Hello) { h.Signer = []byte("key") }}, CheckSigner, "nobody approved"},
		"PCR 11 alone":                     {wire{claim: func(h *Hello) { h.PCRs = []int{11} }}, CheckPCRs, "PCR 11"},
		"PCRs that leave the kernel open":  {wire{claim: func(h *Hello) { h.PCRs = []int{4, 7} }}, CheckPCRs, "open"},
		"another bank":                     {wire{claim: func(h *Hello) { h.Bank = crypto.SHA384 }}, CheckPCRs, "another PCR bank"},
		"an index that is not the owner's": {wire{claim: func(h *Hello) { h.EpochIndex = 0x01C00002 }}, exchange.CheckMessage, "owner's range"},
		"no formats":                       {wire{hello: func(h *Hello) { h.Formats = nil }}, exchange.CheckMessage, "formats"},
		"formats descending":               {wire{hello: func(h *Hello) { h.Formats = []int{2, 1} }}, exchange.CheckMessage, "ascending"},
		"PCRs descending":                  {wire{hello: func(h *Hello) { h.PCRs = []int{7, 4} }}, exchange.CheckMessage, "ascending"},
		"no PCRs":                          {wire{hello: func(h *Hello) { h.PCRs = nil }}, exchange.CheckMessage, "PCRs"},
		"no bank":                          {wire{hello: func(h *Hello) { h.Bank = crypto.SHA1 }}, exchange.CheckMessage, "bank"},
		"a reference without a signer":     {wire{hello: func(h *Hello) { h.Ref = []byte{1} }}, exchange.CheckMessage, "reference"},
		"a long key":                       {wire{hello: func(h *Hello) { h.Verifier = make([]byte, exchange.MaxKey+1) }}, exchange.CheckMessage, "verifier's key"},
		"a node without a name":            {wire{hello: func(h *Hello) { h.Node = "" }}, exchange.CheckMessage, "node name"},
	} {
		r.wire, r.finding = c.wire, ""
		r.refused(name, c.check, c.words)
		if r.finding != findings[name] {
			t.Errorf("%s: the finding is %q, want %q", name, r.finding, findings[name])
		}
		delete(findings, name)
	}
	if len(findings) > 0 {
		t.Errorf("no such attacks: %v", findings)
	}
	r.accepted("undisturbed, after all of them")
}

// TestSRKOfAnotherHierarchy: a key with the template that does not belong to the owner
// hierarchy.
func TestSRKOfAnotherHierarchy(t *testing.T) {
	r := newRig(t, simboot.Baseline(simboot.UKI))
	var hello *Hello
	err := r.machine.TPM().Do(t.Context(), func(tp transport.TPM) error {
		primary, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHNull, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(tp)
		if err != nil {
			return err
		}
		defer func() { _, _ = tpm2.FlushContext{FlushHandle: primary.ObjectHandle}.Execute(tp) }()
		public, err := primary.OutPublic.Contents()
		if err != nil {
			return err
		}
		srk := &keys.SRK{Handle: primary.ObjectHandle, Name: primary.Name, Public: *public}
		return exchange.WithMachine(tp, srk, func(m *exchange.Machine) error {
			var err error
			if hello, err = NewHello(m, cluster, "beta", r.terms); err != nil {
				return err
			}
			pending, c, err := r.verifier.Challenge(hello, exporter(1))
			if err != nil {
				return err
			}
			e, _, err := Respond(m, hello, c, exporter(1), r.logs().Explaining)
			if err != nil {
				return err
			}
			if err := pending.Prove(e.Proof); err != nil {
				return err
			}
			_, err = pending.Judge(e)
			return err
		})
	})
	if refusal, ok := errors.AsType[*exchange.Refusal](err); !ok || refusal.Check != exchange.CheckSRK || !strings.Contains(err.Error(), "owner hierarchy") {
		t.Errorf("%v", err)
	}
}

// TestOtherBoots: a boot other than the approved one, a boot in another phase, and a
// boot that measured nothing are refused.
func TestOtherBoots(t *testing.T) {
	r := newRig(t, simboot.Baseline(simboot.UKI))
	for name, change := range map[string]func(*simboot.Boot){
		"command line": func(b *simboot.Boot) { b.CommandLine += " init=/bin/sh" },
		"kernel":       func(b *simboot.Boot) { b.Kernel = "6.13" },
		"Secure Boot":  func(b *simboot.Boot) { b.SecureBoot = false },
	} {
		b := simboot.Baseline(simboot.UKI)
		change(&b)
		r.machine.Reboot(b)
		r.wire = wire{}
		r.refused(name, exchange.CheckBootPolicy, "the boot policy refuses this boot")
	}
	phased := simboot.Baseline(simboot.UKI)
	phased.Phases = simboot.AllPhases
	r.machine.Reboot(phased)
	r.approvals["beta"].BootPolicy = r.policy(0, 4, 7)
	r.approvals["beta"].Phase = "sysinit"
	r.refused("another phase", CheckPhase, `slots are made in phase "sysinit"`)
	r.approvals["beta"].Phase = "ready"
	r.accepted("the phase in which slots are made")
	r.approvals["beta"].Phase = ""
	r.accepted("any phase")
	// A boot policy that demands no PCR of the kernel does not admit an unmeasured
	// kernel.
	r.machine.Reboot(simboot.Baseline(simboot.UKI))
	r.approvals["beta"].Phase = "ready"
	r.accepted("a boot whose phases nobody measures")
	r.approvals["beta"].Phase = ""
	r.approvals["beta"].BootPolicy = r.policy(4, 7)
	r.terms.PCRs = []int{4, 7, 14}
	r.refused("nothing was measured into PCR 14", CheckPCRs, "kernel")
	r.terms.PCRs = []int{4, 7}
	r.refused("the kernel is left out", CheckPCRs, "kernel")
	r.machine.Reboot(simboot.Baseline(simboot.Direct))
	for name, pcrs := range map[string][]int{"as it would seal by itself": {4, 7, 11}, "as GRUB's machines": {4, 7, 8, 9}, "all of the firmware": {0, 1, 2, 3, 4, 5, 6, 7}} {
		r.terms.PCRs, r.approvals["beta"].BootPolicy = pcrs, r.policy(0)
		r.refused("the hypervisor started a kernel that nothing measured, and PCRs "+name, CheckPCRs, "PCR 4 has no image")
	}
	r.machine.Reboot(simboot.Baseline(simboot.UKI))
	r.terms.PCRs, r.approvals["beta"].BootPolicy = []int{4, 7}, r.policy(4, 7)
	r.approvals["beta"].AnySigned = true
	if p := r.accepted("what Secure Boot's keys let start"); len(p.State.Values) != 2 {
		t.Errorf("%+v", p.State)
	}
}

// TestApprovedTerms: the approved remote verifier and the approved signer are in the
// boot state to wrap for.
func TestApprovedTerms(t *testing.T) {
	r := newRig(t, simboot.Baseline(simboot.UKI))
	key := func() tpm2.TPMTPublic {
		p, err := authpolicy.PublicKey(ecKey(t).Public())
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	verifier := &tpm.Verifier{Signer: tpm.Signer{Key: key(), Ref: []byte("ref")}, Cluster: cluster}
	signer := tpm.Signer{Key: key(), Ref: []byte("generation 1")}
	r.approvals["beta"].Verifier = verifier
	r.refused("no verifier", CheckVerifier, "or none")
	r.terms.Verifier = tpm2.Marshal(verifier.Key)
	if p := r.accepted("the approved verifier"); p.State.Verifier != verifier || p.State.Use != tpm.UsePresent {
		t.Errorf("%+v", p.State)
	}
	r.approvals["beta"].Signers = []tpm.Signer{{Key: key(), Ref: signer.Ref}, signer}
	r.terms.Signer, r.terms.Ref, r.terms.PCRs = tpm2.Marshal(signer.Key), signer.Ref, []int{7}
	if p := r.accepted("an approved signer"); p.State.Use != tpm.UseSigned || !bytes.Equal(p.State.Signer.Ref, signer.Ref) || !bytes.Equal(tpm2.Marshal(p.State.Signer.Key), tpm2.Marshal(signer.Key)) || len(p.State.Values) != 1 {
		t.Errorf("%+v", p.State)
	}
	r.terms.Signer = tpm2.Marshal(key())
	r.refused("another key for the same generation", CheckSigner, "nobody approved")
	r.terms.Signer = tpm2.Marshal(signer.Key)
	r.terms.Ref = []byte("generation 0")
	r.refused("another generation", CheckSigner, "nobody approved")
	r.terms.Ref = signer.Ref
	r.verifier.EKCertificate = func(certificate, _ []byte) error { return errors.New("of no manufacturer") }
	r.refused("no certificate", exchange.CheckEKCertificate, "no manufacturer")
}

// TestContext: each term counts, and the vectors never change within a version.
func TestContext(t *testing.T) {
	base := Terms{Formats: []int{1, 2}, Bank: crypto.SHA256, PCRs: []int{4, 7, 11}, EpochIndex: index, Epoch: 3, Verifier: []byte("v"), Signer: []byte("s"), Ref: []byte("r")}
	seen := map[string]string{}
	for name, change := range map[string]func(*Terms){
		"none": func(*Terms) {}, "formats": func(x *Terms) { x.Formats = []int{2} }, "bank": func(x *Terms) { x.Bank = crypto.SHA384 }, "PCRs": func(x *Terms) { x.PCRs = []int{4, 7} },
		"index": func(x *Terms) { x.EpochIndex++ }, "epoch": func(x *Terms) { x.Epoch++ }, "verifier": func(x *Terms) { x.Verifier = nil },
		"signer": func(x *Terms) { x.Signer = nil }, "reference": func(x *Terms) { x.Ref = nil }, "moved": func(x *Terms) { x.Verifier, x.Signer = nil, []byte("vs") },
	} {
		c := base
		change(&c)
		if other, ok := seen[string(c.Context())]; ok {
			t.Errorf("%s and %s have the same context", name, other)
		}
		seen[string(c.Context())] = name
	}
	digest := purpose.Digest(&exchange.Transcript{Cluster: cluster, Node: "beta", Nonce: []byte{1}, Exporter: []byte{2}, Context: base.Context(), EK: []byte{4}, AK: []byte{5}, SRK: []byte{6}})
	for name, c := range map[string][2]string{
		"context":    {hex.EncodeToString(base.Context()), vectorContext},
		"transcript": {hex.EncodeToString(digest), vectorTranscript},
		"proof":      {hex.EncodeToString(purpose.Answer([]byte{7}, digest)), vectorProof},
		"exporter":   {purpose.Exporter, "EXPORTER-kleidi-join-v1"},
	} {
		if c[0] != c[1] {
			t.Errorf("%s: %s, want %s", name, c[0], c[1])
		}
	}
}

const (
	vectorContext    = "0000000000000010000000000000000100000000000000020000000000000002000b000000000000000304070b000000000000000401804b0700000000000000080000000000000003000000000000000176000000000000000173000000000000000172"
	vectorTranscript = "90be75af33b9c1d144c8b54acbff770c3c092edb9678c51bdb9946c8aff19679"
	vectorProof      = "1e81d5cb332da1c18b4bbf707c0d2fbe56530a4757271c80e854f022fa0566dc"
)

// FuzzChallenge: a Hello comes from anybody. No byte of it ends the process, and only a
// Hello with the approved endorsement key gets a challenge.
func FuzzChallenge(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	ek, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		f.Fatal(err)
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		f.Fatal(err)
	}
	srk := tpm2.ECCSRKTemplate
	srk.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]}})
	approval := &Approval{EK: keys.EKDigestOf(ek), BootPolicy: &bootpolicy.BootPolicy{Bank: "sha256"}}
	v := &Verifier{Cluster: cluster, Format: 2, Approval: func(string) *Approval { return approval }}
	f.Add("beta", ek, []byte("ak"), tpm2.Marshal(srk), uint32(index), []byte{4, 7}, []byte(nil))
	f.Add("beta", ek, []byte("ak"), []byte("srk"), uint32(0), []byte{7, 4}, []byte("key"))
	f.Fuzz(func(t *testing.T, node string, ek, ak, srk []byte, epochIndex uint32, pcrs, extra []byte) {
		h := &Hello{Cluster: cluster[:], Node: node, EK: ek, AK: ak, SRK: srk, Terms: Terms{Formats: []int{2}, Bank: crypto.SHA256, EpochIndex: epochIndex, Verifier: extra, Signer: extra, Ref: extra}}
		for _, i := range pcrs {
			h.PCRs = append(h.PCRs, int(i))
		}
		p, _, err := v.Challenge(h, exporter(1))
		if err != nil {
			if _, ok := errors.AsType[*exchange.Refusal](err); !ok {
				t.Errorf("%v is no refusal", err)
			}
			return
		}
		if keys.EKDigestOf(ek) != approval.EK || len(p.Transcript()) != 32 {
			t.Errorf("%+v gets a challenge", h)
		}
	})
}

// TestChecks: each check of a join is in the list for metrics and logs.
func TestChecks(t *testing.T) {
	seen := map[exchange.Check]bool{}
	for _, c := range Checks() {
		if c == "" || seen[c] {
			t.Errorf("%q is there twice", c)
		}
		seen[c] = true
	}
}

func (r *rig) srk() (public []byte) {
	r.Helper()
	err := r.machine.TPM().Do(r.Context(), func(t transport.TPM) error {
		return keys.WithSRK(t, keys.Owner{}, nil, func(srk *keys.SRK) error {
			public = tpm2.Marshal(srk.Public)
			return nil
		})
	})
	if err != nil {
		r.Fatal(err)
	}
	return public
}

// weaken clears an attribute of a key.
func weaken(t *testing.T, public []byte) []byte {
	t.Helper()
	p, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
	if err != nil {
		t.Fatal(err)
	}
	p.ObjectAttributes.FixedTPM = false
	return tpm2.Marshal(p)
}

func spki(t *testing.T) []byte {
	t.Helper()
	b, err := x509.MarshalPKIXPublicKey(ecKey(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func ecKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// cut removes the last event of PCR 7.
func cut(t *testing.T, e *exchange.Evidence) {
	t.Helper()
	log, err := eventlog.Parse(e.FirmwareLog)
	if err != nil {
		t.Fatal(err)
	}
	for i, event := range slices.Backward(log.Events) {
		if event.PCR == 7 {
			log.Events = slices.Delete(log.Events, i, i+1)
			break
		}
	}
	e.FirmwareLog = log.Encode()
}

func copyOf(e *exchange.Evidence) *exchange.Evidence {
	c := *e
	c.Proof, c.Attest, c.Signature = bytes.Clone(e.Proof), bytes.Clone(e.Attest), bytes.Clone(e.Signature)
	c.FirmwareLog, c.UserspaceLog, c.PCRs = slices.Clone(e.FirmwareLog), slices.Clone(e.UserspaceLog), maps.Clone(e.PCRs)
	return &c
}
