// Package verifierd is the running verifier of the remote gate: its configuration
// file, its audit log, and the service that answers nodes until it is told to stop.
//
// SIGHUP makes it read the configuration, the keys and the boot policies again. A
// reload that fails changes nothing: the verifier keeps the configuration that it has.
package verifierd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/beezy-dev/kleidi/grpcserver/monitor"
	"github.com/beezy-dev/kleidi/grpcserver/verifier"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/supervise"
	"github.com/beezy-dev/kleidi/internal/version"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
)

// stopTimeout bounds how long exchanges in progress may take.
const stopTimeout = 5 * time.Second

// Service is a running verifier.
type Service struct {
	config *Config
	log    *slog.Logger
	server *verifier.Server
	health *health
	http   *monitor.Server
}

// New reads the keys and boot policies that c names, and opens the audit log.
func New(c *Config, log *slog.Logger) (*Service, error) {
	s := &Service{config: c, log: log}
	certificate, v, err := c.identity()
	if err != nil {
		return nil, err
	}
	audit := &auditFile{files.Log{Path: c.Audit.File}}
	if err := audit.Append(nil); err != nil {
		return nil, fmt.Errorf("audit.file: %w; without it every answer is no", err)
	}
	s.health = newHealth(audit, len(c.Nodes))
	s.http = monitor.New(monitor.Handler(s.health.registry, s.health.ready, s.health.remarks))
	s.server, err = verifier.NewServer(verifier.Options{Verifier: v, Certificate: *certificate, Record: audit.record, Registerer: s.health.registry, Log: s.log})
	return s, err
}

// Run returns when ctx has ended and every exchange has.
func (s *Service) Run(ctx context.Context) error {
	l, err := net.Listen("tcp", s.config.Listen)
	if err != nil {
		return fmt.Errorf("listen: %w; check that nothing else listens there", err)
	}
	s.log.Info("verifier listening", "version", version.String(), "address", l.Addr().String(), "cluster", s.config.ClusterID, "nodes", len(s.config.Nodes))
	if len(s.config.Nodes) == 0 {
		s.log.Warn("no node is registered, so every answer is no; run kleidi verifier register NODE --ek sha256:… --boot-policy FILE")
	}
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var running sync.WaitGroup
	running.Go(func() { s.watch(ctx, hup) })
	if s.config.HTTP.Socket != "" {
		running.Go(func() { s.keep(ctx, "health and metrics socket", s.serveHTTPSocket) })
	}
	if s.config.HTTP.Address != "" {
		running.Go(func() { s.keep(ctx, "health and metrics address", s.serveHTTPAddress) })
	}
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
	running.Go(func() {
		<-ctx.Done()
		_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
		grace, cancel := context.WithTimeout(context.Background(), stopTimeout)
		defer cancel()
		s.server.GracefulStop(grace)
		_ = s.http.Shutdown(grace)
	})
	err = s.server.Serve(l)
	cancel()
	running.Wait()
	return err
}

func (s *Service) keep(ctx context.Context, what string, f func() error) {
	supervise.Keep(ctx, s.log, what, f)
}

// watch reloads on each signal until ctx ends.
func (s *Service) watch(ctx context.Context, hup <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-hup:
			s.reload()
		}
	}
}

// reload reads the configuration again, with everything that it names.
func (s *Service) reload() {
	c, err := Load(s.config.path)
	if err == nil {
		err = s.replace(c)
	}
	s.health.reloaded(c, err)
	if err != nil {
		s.log.Error("reload failed: the former configuration stays in force", "error", err)
		return
	}
	s.log.Info("SIGHUP: the configuration was read again", "nodes", len(c.Nodes))
}

func (s *Service) replace(c *Config) error {
	certificate, v, err := c.identity()
	if err != nil {
		return err
	}
	if c.Listen != s.config.Listen || c.Audit != s.config.Audit || c.HTTP != s.config.HTTP {
		return errors.New("listen, audit and http are read at start only; restart kleidi verifier")
	}
	s.server.Replace(v, *certificate)
	return nil
}

// identity reads the parts that a running verifier can replace.
func (c *Config) identity() (*tls.Certificate, *remote.Verifier, error) {
	certificate, err := c.tls()
	if err != nil {
		return nil, nil, err
	}
	v, err := c.Verifier()
	return certificate, v, err
}

// Verifier combines the signing keys, the CAs and the registered nodes.
func (c *Config) Verifier() (*remote.Verifier, error) {
	keys, err := c.keys()
	if err != nil {
		return nil, err
	}
	v := &remote.Verifier{Cluster: c.ClusterID, Keys: keys, Nodes: map[string]remote.Registration{}}
	if v.EKCertificate, err = c.endorsements(); err != nil {
		return nil, err
	}
	for i, n := range c.Nodes {
		p, err := files.ReadBootPolicy(n.BootPolicy)
		if err != nil {
			return nil, fmt.Errorf("nodes[%d].bootPolicy: %w", i, err)
		}
		v.Nodes[n.Name] = remote.Registration{EK: n.EK, BootPolicy: p}
	}
	return v, nil
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
