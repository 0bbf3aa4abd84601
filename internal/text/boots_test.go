package text

import (
	"io"
	"testing"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/inspect"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// TestVerdict: an acceptance says what it rests on, and a refusal never says "accepted".
func TestVerdict(t *testing.T) {
	finding := bootpolicy.Finding{Rule: "pcrs.4", PCR: 4, Event: 2, Problem: "kernel changed"}
	accepted, refused := &bootpolicy.Verdict{Accepted: true}, &bootpolicy.Verdict{Findings: []bootpolicy.Finding{finding}, More: 3}
	renders(t, "quoted", func(w io.Writer) { Verdict(w, accepted, false) }, "accepted")
	renders(t, "claimed", func(w io.Writer) { Verdict(w, accepted, true) }, "accepted, if the log tells the truth: no PCR values were given with --pcrs")
	for _, claimed := range []bool{false, true} {
		renders(t, "refused", func(w io.Writer) { Verdict(w, refused, claimed) }, "- "+finding.String(), "- and 3 more")
	}
}

// TestEvidence: an acceptance names what the file does not prove.
func TestEvidence(t *testing.T) {
	v := &inspect.EvidenceVerdict{Verdict: &bootpolicy.Verdict{Accepted: true}, AttestationKey: "sha256:aa"}
	const key, where = "accepted, as quoted by attestation key sha256:aa", "the file does not prove in which TPM that key is"
	renders(t, "without a nonce", func(w io.Writer) { Evidence(w, v) }, key, where, "the file does not prove when it was quoted: no nonce was given with --nonce")
	v.Fresh = true
	renders(t, "with a nonce", func(w io.Writer) { Evidence(w, v) }, key, where)
	v.Verdict = &bootpolicy.Verdict{More: 1}
	renders(t, "refused", func(w io.Writer) { Evidence(w, v) }, "- and 1 more")
}

// TestEvents: an event without a PCR has a dash.
func TestEvents(t *testing.T) {
	renders(t, "events", func(w io.Writer) {
		Events(w, []bootpolicy.Row{{Event: 0, PCR: eventlog.NoPCR, UntrustedType: "EV_NO_ACTION", What: "spec"}, {Event: 1, PCR: 4, UntrustedType: "EV_SEPARATOR", Backed: "yes", What: "separator"}})
	},
		"EVENT  PCR  TYPE (CLAIMED)  DIGEST  BACKED BY  WHAT",
		"0      -    EV_NO_ACTION                       spec",
		"1      4    EV_SEPARATOR            yes        separator")
}

// TestBootStates: only a state with a slot counts, and a foreign generation has a dash.
func TestBootStates(t *testing.T) {
	renders(t, "none", func(w io.Writer) { BootStates(w, nil) }, "there are no signed boot states; see docs/updates.md")
	renders(t, "two", func(w io.Writer) {
		BootStates(w, []inspect.StateReport{
			{File: "a.json", Key: "0123456789abcdef0123", Generation: 3, Bank: "sha256", PCRs: []int{4, 11}, What: "6.13", Counts: true},
			{File: "b.json", Key: "0123456789abcdef0123", Bank: "sha256", PCRs: []int{11}},
		})
	},
		"KEY               GENERATION  PCRS            HAS A SLOT  FILE    WHAT",
		"0123456789abcdef  3           4, 11 (sha256)  yes         a.json  6.13",
		"0123456789abcdef  -           11 (sha256)     no          b.json  ")
}

// TestNext: the PCRs come in their order, and those that change are marked.
func TestNext(t *testing.T) {
	r := &reseal.NextResult{BootType: "uki", Bank: "sha256", PCRs: map[int]string{11: "bb", 4: "aa"}, Moved: []int{11}}
	head := []string{"next boot       uki, sha256", "  PCR 4         aa", "  PCR 11        bb  changes"}
	renders(t, "predicted", func(w io.Writer) { Next(w, r) }, head...)
	r.Keyring = &admin.KeyringState{CurrentKeyID: "k1-a", Revision: 2}
	renders(t, "sealed", func(w io.Writer) { Next(w, r) }, append(head, "current key ID  k1-a", "revision        2")...)
}

// TestPolicyChanges: two policies with the same demands say so.
func TestPolicyChanges(t *testing.T) {
	renders(t, "same", func(w io.Writer) { PolicyChanges(w, nil) }, "both policies demand the same")
	c := bootpolicy.Change{Path: "secureBoot", Was: "on", Now: "off"}
	renders(t, "one", func(w io.Writer) { PolicyChanges(w, []bootpolicy.Change{c}) }, c.String())
}

// TestNarrowed: only a boot policy that was written "no longer allows" a boot, and says so
// before it names the boots.
func TestNarrowed(t *testing.T) {
	c := bootpolicy.Change{Path: "pcrs.4.sequences[0]", Was: "aa"}
	r := &reseal.Narrowed{File: "policy.yaml"}
	renders(t, "nothing", func(w io.Writer) { Narrowed(w, r) }, "policy.yaml allows no superseded boot")
	r.Changes = []bootpolicy.Change{c}
	renders(t, "written", func(w io.Writer) { Narrowed(w, r) }, "policy.yaml no longer allows these:", c.String())
	r.DryRun = true
	renders(t, "dry run", func(w io.Writer) { Narrowed(w, r) }, c.String())
}
