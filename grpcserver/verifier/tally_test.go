package verifier

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
)

// TestRefusalsBeforeTheProofAreSummedUp: any number of them leads to one line in the
// audit log and one in the log, and each peer is answered.
func TestRefusalsBeforeTheProofAreSummedUp(t *testing.T) {
	r := newRig(t)
	const times = 7
	var hello *remote.Hello
	r.refused("a stranger", r.ask(altered{Channel: r.client(), hello: func(h *remote.Hello) { h.Node = "stranger"; hello = h }}), seal.CauseAttestation, "is not registered")
	for range times - 1 { // without a TPM, which takes long on a busy machine
		_, err := r.client().Attest(t.Context(), hello, nil)
		r.refused("a stranger", err, seal.CauseAttestation, "is not registered")
	}
	if len(r.verdicts) != 0 {
		t.Errorf("%d lines were written at once", len(r.verdicts))
	}
	if n := strings.Count(r.log.String(), `msg="evidence refused"`); n != 1 {
		t.Errorf("%d lines in the log", n)
	}
	v := r.lastVerdict()
	if v.Count != times || v.Accepted || v.Node != "stranger" || v.Check != string(remote.CheckNode) || v.Peer != "127.0.0.1" || v.Since.After(v.Time) || len(r.verdicts) != 1 {
		t.Errorf("%d lines, the last one: %+v", len(r.verdicts), v)
	}
	r.refused("the next interval", r.ask(altered{Channel: r.client(), hello: func(h *remote.Hello) { h.Node = "stranger" }}), seal.CauseAttestation)
	if n := strings.Count(r.log.String(), `msg="evidence refused"`); n != 2 {
		t.Errorf("%d lines in the log", n)
	}
	if v := r.lastVerdict(); v.Count != 1 || !strings.HasPrefix(v.Peer, "127.0.0.1:") {
		t.Errorf("%+v", v)
	}
}

// TestMetrics: each outcome is counted, from zero on.
func TestMetrics(t *testing.T) {
	registry := prometheus.NewRegistry()
	r := newRig(t, func(o *Options) { o.Registerer = registry })
	exchanges := func(o outcome) float64 {
		return testutil.ToFloat64(r.server.metrics.exchanges.WithLabelValues(string(o)))
	}
	if n, err := testutil.GatherAndCount(registry, "kleidi_verifier_exchanges_total", "kleidi_verifier_refusals_total", "kleidi_verifier_connections_dropped_total",
		"kleidi_verifier_connections", "kleidi_verifier_nodes", "kleidi_verifier_audit_failures_total"); err != nil || n != 6+len(remote.Checks())+2+2+1+1 {
		t.Errorf("%d series at the start, %v", n, err)
	}
	r.works("an ordinary exchange")
	_ = r.ask(altered{Channel: r.client(), hello: func(h *remote.Hello) { h.Node = "x" }})
	_ = r.ask(altered{Channel: r.client(), evidence: func(e *remote.Evidence) { e.FirmwareLog = nil }})
	_ = r.ask(odd{r, statement(&Statement{})})
	r.eventually("no place is taken", func() bool { return r.server.wire.Proven() == 0 })
	leave, _ := r.server.wire.Take(r.options.Verifier.Nodes["alpha"].EK)
	leave2, _ := r.server.wire.Take(r.options.Verifier.Nodes["alpha"].EK)
	_ = r.ask(r.client())
	leave()
	leave2()
	r.eventually("the places are free", func() bool { return r.server.wire.Proven() == 0 })
	r.noRecord = errors.New("no space left on device")
	_ = r.ask(r.client())
	for _, o := range []outcome{outcomeAccepted, outcomeUnproven, outcomeRefused, outcomeEnded, outcomeBusy, outcomeFailed} {
		r.eventually(fmt.Sprintf("%s is counted once", o), func() bool { return exchanges(o) == 1 })
	}
	if n := testutil.ToFloat64(r.server.metrics.refusals.WithLabelValues(string(remote.CheckNode))); n != 1 {
		t.Errorf("%v refusals of unknown nodes", n)
	}
	if at := testutil.ToFloat64(r.server.metrics.accepted.WithLabelValues("alpha")); at == 0 {
		t.Error("when alpha was accepted is not shown")
	}
	if n := testutil.ToFloat64(r.server.metrics.audit); n != 1 {
		t.Errorf("%v audit failures", n)
	}
	if _, err := NewServer(Options{Verifier: r.options.Verifier, Registerer: registry}); err == nil {
		t.Error("the metrics are registered twice")
	}
}
