package verifierd

import (
	"fmt"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// health is a running verifier's report about itself.
type health struct {
	registry *prometheus.Registry
	audit    *auditFile

	mu     sync.Mutex
	nodes  int
	reload error // of the last SIGHUP
}

func newHealth(audit *auditFile, nodes int) *health {
	h := &health{registry: prometheus.NewRegistry(), audit: audit, nodes: nodes}
	h.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "kleidi_verifier_reload_failed",
			Help: "1 if the last SIGHUP found a configuration that can't be used, so that the former one stays in force; 0 otherwise."}, h.reloadFailed))
	return h
}

// reloaded notes the outcome of a reload: c is in force from now on, unless there is an
// error.
func (h *health) reloaded(c *Config, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.reload = err; err == nil {
		h.nodes = len(c.Nodes)
	}
}

func (h *health) reloadFailed() float64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.reload != nil {
		return 1
	}
	return 0
}

// ready returns nil if an honest node would be answered.
func (h *health) ready() error {
	if err := h.audit.Failing(); err != nil {
		return fmt.Errorf("the audit log can't be written, so every answer is no: %w", err)
	}
	return nil
}

func (h *health) remarks() (remarks []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.nodes == 0 {
		remarks = append(remarks, "no node is registered, so every answer is no")
	}
	if h.reload != nil {
		remarks = append(remarks, fmt.Sprintf("reload failed, so the former configuration stays in force: %s", h.reload))
	}
	return remarks
}
