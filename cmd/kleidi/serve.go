package main

import (
	"context"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/fsnotify/fsnotify"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver"
	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

func (a *app) newServe() *cobra.Command {
	return &cobra.Command{
		Use:   "serve",
		Short: "Serve KMS v2 to kube-apiserver",
		Long: `Serve KMS v2 to kube-apiserver. A locked keyring is no reason to stop: kleidi answers
with what is wrong, tries again, and serves as soon as the keyring opens.

SIGHUP has it read the keyring anew; SIGTERM ends it once calls in progress are
answered.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			s, err := newServer(cfg, logger(cfg))
			if err != nil {
				return err
			}
			s.run(cmd.Context())
			return nil
		},
	}
}

// server is a running serve.
type server struct {
	node   *node
	health *health
	opened chan struct{} // an attempt has opened the keyring
	kms    *grpcserver.Server
	admin  *admin.Server
	http   *http.Server
}

// run returns when ctx has ended and everything has stopped.
func (s *server) run(ctx context.Context) {
	s.node.log.Info("starting", "version", version(), "node", s.node.cfg.Node, "tpm", s.node.cfg.TPM.Device, "state", s.node.cfg.State.Dir)
	if err := store.PrepareDir(s.node.cfg.State.Dir); err != nil {
		s.node.log.Warn("state folder", "error", err)
	}
	var running sync.WaitGroup
	running.Go(func() { s.keep(ctx, "KMS socket", s.serveKMS) })
	running.Go(func() { s.keep(ctx, "admin socket", s.serveAdmin) })
	if s.node.cfg.HTTP.Address != "" {
		running.Go(func() { s.keep(ctx, "health and metrics", s.serveHTTP) })
	}
	running.Go(func() { s.node.unlocker.Run(ctx) })
	running.Go(func() { s.tidyUp(ctx) })
	running.Go(func() { s.selfTest(ctx) })
	running.Go(func() { s.watch(ctx) })
	<-ctx.Done()
	s.node.log.Info("stopping")
	s.stop()
	running.Wait()
	s.node.close()
}

// tidyUp tidies whenever an attempt has opened the keyring, and tries again where
// that fails.
func (s *server) tidyUp(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.opened:
		}
		_, _ = backoff.Retry(ctx, func() (struct{}, error) {
			// The attempt is told of before its outcome is there for all to see. tidy
			// waits for it, so only then is it clear whether anything is open.
			err := s.node.tidy(ctx)
			if !s.node.unlocker.State().Open {
				err = nil
			}
			return struct{}{}, err
		}, backoff.WithMaxElapsedTime(0), backoff.WithNotify(func(err error, d time.Duration) {
			s.node.log.Error("slots of earlier boot states still open, as they could not be revoked", "cause", seal.CauseOf(err), "error", err, "retry", d.Round(time.Millisecond))
		}))
	}
}

func newServer(cfg *config.Config, log *slog.Logger) (*server, error) {
	registry := prometheus.NewRegistry()
	h := newHealth(registry)
	opened := make(chan struct{}, 1)
	n, err := newNode(cfg, log, func(cause seal.Cause, timing unlock.Timing) {
		h.attempted(cause, timing)
		if cause == "" {
			select {
			case opened <- struct{}{}:
			default: // one is waiting already
			}
		}
	})
	if err != nil {
		return nil, err
	}
	s := &server{node: n, health: h, opened: opened}
	h.bind(n)
	if s.kms, err = grpcserver.New(n.unlocker, grpcserver.Options{Registerer: registry, Log: log}); err != nil {
		return nil, err
	}
	s.admin = admin.NewServer(admin.Options{Log: log})
	admin.Handle(s.admin, admin.Status, tried(n, n.status))
	admin.Handle(s.admin, admin.Rotate, tried(n, n.rotate))
	admin.Handle(s.admin, admin.Reseal, tried(n, n.anyReseal))
	admin.Handle(s.admin, admin.Suspend, tried(n, n.suspend))
	admin.Handle(s.admin, admin.AddBootStates, tried(n, n.addBootStates))
	admin.Handle(s.admin, admin.RevokeBootStates, tried(n, n.revokeBootStates))
	admin.Handle(s.admin, admin.AddSlot, tried(n, n.addSlot))
	admin.Handle(s.admin, admin.RemoveSlot, tried(n, n.removeSlot))
	admin.Handle(s.admin, admin.TestSlots, tried(n, n.testSlots))
	admin.Handle(s.admin, admin.RewrapSlot, tried(n, n.rewrapSlot))
	admin.Handle(s.admin, admin.Recover, n.recover)
	admin.Handle(s.admin, admin.Restore, n.restore)
	admin.Handle(s.admin, admin.Save, n.save)
	admin.Handle(s.admin, admin.Verify, n.verify)
	admin.Handle(s.admin, admin.Reload, n.reload)
	s.http = &http.Server{Handler: h.handler(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10}
	return s, nil
}

// tried has an operation wait a moment for the first attempt to unlock: to systemd the
// unit is ready before that, and a command may follow at once.
func tried[Req, Resp any](n *node, f func(context.Context, Req) (Resp, error)) func(context.Context, Req) (Resp, error) {
	return func(ctx context.Context, req Req) (Resp, error) {
		select {
		case <-n.unlocker.Tried():
		case <-time.After(startGrace):
		case <-ctx.Done():
		}
		return f(ctx, req)
	}
}

// keep runs f until ctx ends, and again after a while where it fails: a folder
// that is missing or a port that is taken can be mended without a restart.
func (s *server) keep(ctx context.Context, what string, f func() error) {
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = 200*time.Millisecond, 15*time.Second
	for ctx.Err() == nil {
		err := f()
		if err == nil || ctx.Err() != nil {
			return
		}
		d := wait.NextBackOff()
		s.node.log.Error(what+" failed", "error", err, "retry", d.Round(time.Millisecond))
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
	}
}

func (s *server) serveKMS() error {
	c := s.node.cfg.KMS
	var owner *grpcserver.Owner
	if c.SocketUID >= 0 || c.SocketGID >= 0 {
		owner = &grpcserver.Owner{UID: orOwn(c.SocketUID, os.Geteuid()), GID: orOwn(c.SocketGID, os.Getegid())}
	}
	l, err := grpcserver.Listen(grpcserver.ListenConfig{
		Path: c.Socket, Mode: fs.FileMode(c.SocketMode), Owner: owner, AllowedUIDs: c.AllowedUIDs, Log: s.node.log,
	})
	s.health.setKMS(err)
	if err != nil {
		return err
	}
	s.node.log.Info("listening", "socket", c.Socket)
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
	// A call that comes now waits in the socket's queue: an error would make
	// kube-apiserver wait 10 s before it asks again.
	select {
	case <-s.node.unlocker.Tried():
	case <-time.After(startGrace):
	}
	err = s.kms.Serve(l)
	s.health.setKMS(err)
	return err
}

// startGrace is how long the first calls wait for the first attempt to unlock; it
// is less than the 3 s that kube-apiserver gives a call.
const startGrace = 2 * time.Second

func orOwn(id, own int) int {
	if id >= 0 {
		return id
	}
	return own
}

func (s *server) serveAdmin() error {
	l, err := admin.Listen(s.node.cfg.Admin.Socket, s.node.log)
	if err != nil {
		return err
	}
	return s.admin.Serve(l)
}

func (s *server) serveHTTP() error {
	l, err := net.Listen("tcp", s.node.cfg.HTTP.Address)
	if err != nil {
		return err
	}
	if err := s.http.Serve(l); err != http.ErrServerClosed {
		return err
	}
	return nil
}

// stopTimeout bounds how long calls in progress may take.
const stopTimeout = 5 * time.Second

func (s *server) stop() {
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	s.kms.GracefulStop(ctx)
	_ = s.admin.Shutdown(ctx)
	_ = s.http.Shutdown(ctx)
}

// watch reloads on SIGHUP, and when the keyring was changed by someone else.
func (s *server) watch(ctx context.Context) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	events, failed, stop := s.watchFolder()
	defer stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-hup:
			s.node.log.Info("SIGHUP: reading the keyring anew")
			s.node.unlocker.Nudge()
		case err := <-failed: // events may be lost; left unread, it would end the watch
			s.node.log.Warn("watching the state folder: reading the keyring anew, in case that it has changed", "error", err)
			s.node.unlocker.Nudge()
		case e := <-events:
			if filepath.Base(e.Name) == filepath.Base(s.node.cfg.Keyring()) && s.node.unlocker.Changed(ctx) {
				s.node.log.Info("the stored keyring has changed: reading it anew")
				s.node.unlocker.Nudge()
			}
		}
	}
}

// watchFolder watches the folder, since files in it are replaced and not written
// to. Without a watch there is still SIGHUP.
func (s *server) watchFolder() (<-chan fsnotify.Event, <-chan error, func()) {
	w, err := fsnotify.NewWatcher()
	if err == nil {
		err = w.Add(s.node.cfg.State.Dir)
	}
	if err != nil {
		s.node.log.Warn("the state folder can't be watched; send SIGHUP after a change of the keyring", "error", err)
		return nil, nil, func() {}
	}
	return w.Events, w.Errors, func() { _ = w.Close() }
}
