package verifier

import (
	"context"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
)

// between is a channel on which somebody alters the challenge on its way to the node.
type between struct {
	remote.Channel
	challenge func(*remote.Challenge)
}

// Attest implements remote.Channel.
func (b between) Attest(ctx context.Context, h *remote.Hello, answer func(*remote.Challenge, []byte) (*remote.Evidence, error)) ([]byte, error) {
	return b.Channel.Attest(ctx, h, func(c *remote.Challenge, exporter []byte) (*remote.Evidence, error) {
		b.challenge(c)
		return answer(c, exporter)
	})
}

// TestFindings: the log and the audit log say what a proof that failed shows, and the peer
// does not learn it. Other refusals have no finding.
func TestFindings(t *testing.T) {
	r := newRig(t)
	var kept []byte // the right answer of an earlier exchange
	var nonce []byte
	honest := between{altered{Channel: r.client(), evidence: func(e *remote.Evidence) { kept = e.Proof }}, func(c *remote.Challenge) { nonce = c.Nonce }}
	if err := r.ask(honest); err != nil {
		t.Fatal(err)
	}
	if v := r.lastVerdict(); !v.Accepted || v.Finding != "" {
		t.Errorf("%+v", v)
	}
	evidence := func(f func(*remote.Evidence)) remote.Channel { return altered{Channel: r.client(), evidence: f} }
	for name, row := range map[string]struct {
		channel remote.Channel
		check   remote.Check
		finding exchange.Finding
	}{
		"a replayed proof": {evidence(func(e *remote.Evidence) { e.Proof = kept }), remote.CheckProof, exchange.FindingReplay},
		"an earlier nonce": {between{r.client(), func(c *remote.Challenge) { c.Nonce = nonce }}, remote.CheckProof, exchange.FindingStaleNonce},
		"another nonce":    {between{r.client(), func(c *remote.Challenge) { c.Nonce[0] ^= 1 }}, remote.CheckProof, exchange.FindingOtherTranscript},
		"another SRK": {altered{Channel: r.client(), hello: func(h *remote.Hello) { h.SRK = make([]byte, exchange.NameSize) }}, remote.CheckProof,
			exchange.FindingOtherTranscript},
		"a proof guessed": {evidence(func(e *remote.Evidence) { e.Proof = make([]byte, 32) }), remote.CheckProof, exchange.FindingNoSecret},
		"no proof":        {evidence(func(e *remote.Evidence) { e.Proof = nil }), remote.CheckProof, exchange.FindingNoSecret},
		"no log":          {evidence(func(e *remote.Evidence) { e.FirmwareLog = nil }), remote.CheckEvidence, ""},
		"an unknown node": {altered{Channel: r.client(), hello: func(h *remote.Hello) { h.Node = "gamma" }}, remote.CheckNode, ""},
	} {
		before := len(r.log.String())
		err := r.ask(row.channel)
		r.refused(name, err, seal.CauseAttestation, string(row.check)+": ")
		if v := r.lastVerdict(); v.Check != string(row.check) || v.Finding != string(row.finding) {
			t.Errorf("%s: the audit log has %+v, want %q", name, v, row.finding)
		}
		if row.finding == "" {
			continue
		}
		if strings.Contains(err.Error(), string(row.finding)) {
			t.Errorf("%s: the peer learns %v", name, err)
		}
		if said := r.log.String()[before:]; !strings.Contains(said, string(row.finding)) {
			t.Errorf("%s: the log does not say %q: %s", name, row.finding, said)
		}
	}
	r.works("after all of them")
}
