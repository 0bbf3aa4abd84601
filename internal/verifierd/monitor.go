package verifierd

import (
	"fmt"
	"io/fs"
	"net"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/beezy-dev/kleidi/grpcserver/monitor"
)

// DefaultSocket is where health and metrics answer. The folder is the verifier's own: on a
// machine with both, kleidi serve has another one.
const DefaultSocket = "/run/kleidi-verifier/http.sock"

// health is what a running verifier tells of itself.
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
			Help: "1 if the last SIGHUP found a configuration that can't be used, so that the former one counts; 0 else."}, h.reloadFailed))
	return h
}

// reloaded notes what became of a reload: c counts from now on, unless there is an error.
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

// ready is nil where an honest node would be answered.
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
		remarks = append(remarks, fmt.Sprintf("reload failed, so the former configuration counts: %s", h.reload))
	}
	return remarks
}

func (s *Service) serveHTTPSocket() error {
	c := s.config.HTTP
	l, err := monitor.ListenSocket(monitor.SocketConfig{Path: c.Socket, Mode: fs.FileMode(c.SocketMode), GID: c.SocketGID, Log: s.log})
	return s.serveHTTP(l, err)
}

func (s *Service) serveHTTPAddress() error {
	l, err := monitor.ListenTCP(s.config.HTTP.Address)
	return s.serveHTTP(l, err)
}

func (s *Service) serveHTTP(l net.Listener, err error) error {
	if err != nil {
		return err
	}
	return s.http.Serve(l)
}
