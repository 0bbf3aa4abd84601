package verifier

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/beezy-dev/kleidi/tpm/attest/remote"
)

// outcome is how an exchange ended.
type outcome string

const (
	outcomeAccepted outcome = "accepted"
	outcomeRefused  outcome = "refused"  // the node had proven its TPM
	outcomeUnproven outcome = "unproven" // refused before the node had proven its TPM
	outcomeBusy     outcome = "busy"     // the node has other exchanges
	outcomeEnded    outcome = "ended"    // early: by the peer, out of order, or too late
	outcomeFailed   outcome = "failed"   // the verifier could not answer
)

// metrics count how exchanges end, and the present connections.
type metrics struct {
	exchanges *prometheus.CounterVec
	refusals  *prometheus.CounterVec
	drops     *prometheus.CounterVec
	accepted  *prometheus.GaugeVec
	audit     prometheus.Counter
}

func newMetrics() *metrics {
	m := &metrics{
		exchanges: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kleidi_verifier_exchanges_total",
			Help: "Exchanges with nodes, by outcome."}, []string{"outcome"}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kleidi_verifier_refusals_total",
			Help: "Refusals, by the check that failed."}, []string{"check"}),
		drops: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kleidi_verifier_connections_dropped_total",
			Help: "Connections without a proof that were closed, by reason."}, []string{"reason"}),
		accepted: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "kleidi_verifier_accepted_timestamp_seconds",
			Help: "When evidence of a node was last accepted, since the verifier started."}, []string{"node"}),
		audit: prometheus.NewCounter(prometheus.CounterOpts{Name: "kleidi_verifier_audit_failures_total",
			Help: "Attempts to write the audit log that failed."}),
	}
	for _, o := range []outcome{outcomeAccepted, outcomeRefused, outcomeUnproven, outcomeBusy, outcomeEnded, outcomeFailed} {
		m.exchanges.WithLabelValues(string(o)) // so that a rate sees the first one of each
	}
	for _, c := range remote.Checks() {
		m.refusals.WithLabelValues(string(c))
	}
	for _, r := range []string{"silent", "crowded"} {
		m.drops.WithLabelValues(r)
	}
	return m
}

func (m *metrics) ended(o outcome)       { m.exchanges.WithLabelValues(string(o)).Inc() }
func (m *metrics) dropped(reason string) { m.drops.WithLabelValues(reason).Inc() }
