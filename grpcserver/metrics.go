package grpcserver

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// answers are the codes that this server returns. Their series exist from the start, so
// that rate() sees the first failure.
func answers() []codes.Code {
	return []codes.Code{codes.OK, codes.Canceled, codes.InvalidArgument, codes.DeadlineExceeded, codes.NotFound,
		codes.PermissionDenied, codes.ResourceExhausted, codes.Internal, codes.Unavailable, codes.DataLoss}
}

// metrics counts operations. The label children are looked up once, not per call.
type metrics struct {
	operations *prometheus.CounterVec
	durations  *prometheus.HistogramVec
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		operations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kleidi_kms_operations_total",
			Help: "KMS v2 calls, by method and gRPC code.",
		}, []string{"method", "code"}),
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "kleidi_kms_operation_duration_seconds",
			Help: "Time from the arrival of a KMS v2 call to its answer, by method.",
			Buckets: []float64{5e-6, 10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6,
				1e-3, 2.5e-3, 10e-3, 100e-3, 1, 10},
		}, []string{"method"}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.operations, m.durations} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// methodMetrics are the prebuilt children of one method.
type methodMetrics struct {
	vec      *prometheus.CounterVec
	name     string
	byCode   [codes.Unauthenticated + 1]prometheus.Counter
	duration prometheus.Observer
}

func (m *metrics) method(name string) *methodMetrics {
	mm := &methodMetrics{vec: m.operations, name: name, duration: m.durations.WithLabelValues(name)}
	for _, c := range answers() {
		mm.byCode[c] = m.operations.WithLabelValues(name, c.String())
	}
	return mm
}

func (m *methodMetrics) observe(d time.Duration, err error) {
	m.duration.Observe(d.Seconds())
	code := status.Code(err)
	if int(code) < len(m.byCode) && m.byCode[code] != nil {
		m.byCode[code].Inc()
		return
	}
	m.vec.WithLabelValues(m.name, code.String()).Inc()
}
