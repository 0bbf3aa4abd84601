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
			Help: "Refusals, by the check that found something wanting."}, []string{"check"}),
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

// register publishes the metrics; with nil they stay hidden.
func (s *Server) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	gauge := func(name, help string, labels prometheus.Labels, f func() int) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels}, func() float64 { return float64(f()) })
	}
	for _, c := range []prometheus.Collector{
		s.metrics.exchanges, s.metrics.refusals, s.metrics.drops, s.metrics.accepted, s.metrics.audit,
		gauge("kleidi_verifier_connections", "Connections, by whether the peer has proven which TPM it is.", prometheus.Labels{"proven": "no"}, s.wire.Unproven),
		gauge("kleidi_verifier_connections", "Connections, by whether the peer has proven which TPM it is.", prometheus.Labels{"proven": "yes"}, s.wire.Proven),
		gauge("kleidi_verifier_nodes", "Registered nodes.", nil, func() int { return len(s.current.Load().verifier.Nodes) }),
	} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}
