package serve

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/beezy-dev/kleidi/grpcserver"
	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/grpcserver/monitor"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/members"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/rollout"
	"github.com/beezy-dev/kleidi/internal/supervise"
	"github.com/beezy-dev/kleidi/internal/version"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

// Server is a running serve.
type Server struct {
	Node   *node.Node
	health *health
	opened chan struct{} // an attempt has opened the keyring
	kms    *grpcserver.Server
	admin  *admin.Server
	http   *monitor.Server
	desk   *members.Desk
	// adminTried is closed when the admin socket listens, or can't. Only then does
	// serve tell systemd and HTTP clients that it is up, so that a command that follows
	// finds the socket.
	adminTried chan struct{}
	triedOnce  sync.Once
}

// gcPercent is Go's GOGC while serving, unless the environment sets GOGC. Most of the
// cost of a call is gRPC's garbage, so one pause fewer is worth one MiB more. "make
// bench" compares values; above 125 the memory passes 28 MiB.
const gcPercent = 125

// Run returns when ctx has ended and everything has stopped.
func (s *Server) Run(ctx context.Context) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	s.Node.Log.Info("starting", "version", version.String(), "node", s.Node.Config.Node, "tpm", s.Node.Config.TPM.Device, "state", s.Node.Config.State.Dir)
	s.Node.WarnTPM()
	if err := store.PrepareDir(s.Node.Config.State.Dir); err != nil {
		s.Node.Log.Warn("state folder", "error", err)
	}
	var joins uint64
	if s.Node.Config.Join.Listen != "" {
		joins = members.MaxConns
	}
	if err := monitor.CheckFiles(joins); err != nil {
		s.Node.Log.Warn("file descriptors", "error", err)
	}
	var running sync.WaitGroup
	running.Go(func() { s.keep(ctx, "KMS socket", s.serveKMS) })
	running.Go(func() { s.keep(ctx, "admin socket", s.serveAdmin) })
	if s.Node.Config.HTTP.Socket != "" {
		running.Go(func() { s.keep(ctx, "health and metrics socket", s.serveHTTPSocket) })
	}
	if s.Node.Config.HTTP.Address != "" {
		running.Go(func() { s.keep(ctx, "health and metrics address", s.serveHTTPAddress) })
	}
	if s.Node.Config.Join.Listen != "" {
		running.Go(func() { s.keep(ctx, "join.listen", s.desk.Serve) })
	}
	running.Go(func() { s.Node.Unlocker.Run(ctx) })
	if s.Node.Replica != nil {
		running.Go(func() { s.Node.Replica.Run(ctx) })
		running.Go(func() { rollout.Drive(ctx, s.Node) })
		running.Go(func() { s.Node.Access.Renew(ctx, s.Node.Log) })
	}
	running.Go(func() { s.tidyUp(ctx) })
	running.Go(func() { s.selfTest(ctx) })
	running.Go(func() { s.watch(ctx) })
	running.Go(func() { s.feedWatchdog(ctx) })
	<-ctx.Done()
	s.Node.Log.Info("stopping")
	s.stop()
	running.Wait()
	s.Node.Close()
}

// tidyUp tidies whenever an attempt has opened the keyring, and tries again after a
// failure.
func (s *Server) tidyUp(ctx context.Context) {
	for first := true; ; first = false {
		select {
		case <-ctx.Done():
			return
		case <-s.opened:
		}
		if first { // not earlier: a start waits for no TPM command that it can do without
			s.Node.WarnOwner(ctx)
		}
		wait := backoff.NewExponentialBackOff()
		wait.MaxInterval = time.Hour // a TPM that can't be told to refuse is not asked all day
		_, _ = backoff.Retry(ctx, func() (struct{}, error) {
			// The attempt is announced before its result is visible. tidy waits for the
			// result, so only then is it clear whether a keyring is open.
			err := errors.Join(reseal.Tidy(ctx, s.Node), reseal.PayDebts(ctx, s.Node))
			if !s.Node.Unlocker.State().Open {
				err = nil
			}
			return struct{}{}, err
		}, backoff.WithBackOff(wait), backoff.WithMaxElapsedTime(0), backoff.WithNotify(func(err error, d time.Duration) {
			s.Node.Log.Error("slots of earlier boot states still open, as they could not be revoked", "cause", seal.CauseOf(err), "error", err, "retry", d.Round(time.Millisecond))
		}))
	}
}

func (s *Server) keep(ctx context.Context, what string, f func() error) {
	supervise.Keep(ctx, s.Node.Log, what, f)
}

func (s *Server) serveKMS() error {
	c := s.Node.Config.KMS
	var owner *grpcserver.Owner
	if c.SocketUID >= 0 || c.SocketGID >= 0 {
		owner = &grpcserver.Owner{UID: orDefault(c.SocketUID, os.Geteuid()), GID: orDefault(c.SocketGID, os.Getegid())}
	}
	l, err := grpcserver.Listen(grpcserver.ListenConfig{
		Path: c.Socket, Mode: fs.FileMode(c.SocketMode), Owner: owner, AllowedUIDs: c.AllowedUIDs, Self: true, Log: s.Node.Log,
	})
	s.health.setKMS(err)
	if err != nil {
		return err
	}
	s.Node.Log.Info("listening", "socket", c.Socket)
	<-s.adminTried
	go s.reportReady()
	// A call that comes now waits in the socket's queue. After an error kube-apiserver
	// would wait 10 s before it asks again.
	select {
	case <-s.Node.Unlocker.Tried():
	case <-time.After(startGrace):
	}
	err = s.kms.Serve(l)
	s.health.setKMS(err)
	return err
}

// reportReady tells systemd that the unit is started, once the first attempt to unlock has
// ended: a status that follows "systemctl start" shows open, or the fault. A slow backend
// holds up kubelet, which is ordered after the unit, no longer than readyGrace.
func (s *Server) reportReady() {
	select {
	case <-s.Node.Unlocker.Tried():
	case <-time.After(readyGrace):
	}
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
}

// Supervised reports whether systemd waits to be told that the service is up.
func Supervised() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// HoldBack waits before a supervised service that could not be set up ends. systemd starts
// the unit again a second later, without a limit. A few starts a minute are enough to find
// a corrected configuration.
func HoldBack(ctx context.Context, err error) {
	_, _ = daemon.SdNotify(false, "STATUS=can't start: "+strings.ReplaceAll(err.Error(), "\n", " "))
	pause(ctx, holdBack)
}

func (s *Server) serveAdmin() error {
	l, err := admin.Listen(s.Node.Config.Admin.Socket, s.Node.Log)
	s.triedOnce.Do(func() { close(s.adminTried) })
	if err != nil {
		return err
	}
	return s.admin.Serve(l)
}

func (s *Server) serveHTTPSocket() error {
	<-s.adminTried
	c := s.Node.Config.HTTP
	l, err := monitor.ListenSocket(monitor.SocketConfig{Path: c.Socket, Mode: fs.FileMode(c.SocketMode), GID: c.SocketGID, Log: s.Node.Log})
	if err != nil {
		return err
	}
	return s.http.Serve(l)
}

func (s *Server) serveHTTPAddress() error {
	<-s.adminTried
	l, err := monitor.ListenTCP(s.Node.Config.HTTP.Address)
	if err != nil {
		return err
	}
	return s.http.Serve(l)
}

func (s *Server) stop() {
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	s.kms.GracefulStop(ctx)
	s.desk.Stop(ctx)
	_ = s.admin.Shutdown(ctx)
	_ = s.http.Shutdown(ctx)
}

// New makes a Server. It listens nowhere, and touches neither disk nor TPM.
func New(cfg *config.Config, log *slog.Logger) (*Server, error) {
	registry := prometheus.NewRegistry()
	h := newHealth(registry)
	opened := make(chan struct{}, 1)
	var replicated *replica.Replica
	n, err := node.New(cfg, log, func(cause seal.Cause, timing unlock.Timing) {
		h.attempted(cause, timing)
		if cause == "" {
			if replicated != nil {
				replicated.Kick()
			}
			select {
			case opened <- struct{}{}:
			default: // another notice of an opening is already waiting
			}
		}
	})
	if err != nil {
		return nil, err
	}
	s := &Server{Node: n, health: h, opened: opened, adminTried: make(chan struct{})}
	h.bind(n)
	replicated = n.Replica
	if s.kms, err = grpcserver.New(keysOf(n), grpcserver.Options{Registerer: registry, Log: log, Callers: unlock.CallersOf(n.Unlocker)}); err != nil {
		return nil, err
	}
	s.admin = admin.NewServer(admin.Options{Log: log})
	operation.Handle(s.admin, n)
	if s.desk, err = members.NewDesk(n); err != nil {
		return nil, err
	}
	s.desk.Handle(s.admin)
	s.http = monitor.New(h.handler())
	return s, nil
}

// readyGrace bounds the wait of "systemctl start" for the first attempt to unlock.
const readyGrace = 15 * time.Second

// holdBack is the time until a service without a usable configuration ends.
const holdBack = 10 * time.Second

// startGrace bounds the first calls' wait for the first attempt to unlock; it is less
// than kube-apiserver's timeout of 3 s.
const startGrace = 2 * time.Second

func orDefault(id, own int) int {
	if id >= 0 {
		return id
	}
	return own
}

// stopTimeout bounds the calls in progress.
const stopTimeout = 5 * time.Second

// pause waits, and reports whether ctx is still alive.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
