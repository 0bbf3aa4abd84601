package serve

import (
	"context"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/fsnotify/fsnotify"
)

// watch reloads on SIGHUP, and when somebody else changed the keyring.
func (s *Server) watch(ctx context.Context) {
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
			s.Node.Log.Info("SIGHUP: reading the keyring again")
			s.Node.Unlocker.Nudge()
		case err := <-failed: // events may be lost; an unread error would end the watch
			s.Node.Log.Warn("watching the state folder: reading the keyring again, in case it has changed", "error", err)
			s.Node.Unlocker.Nudge()
		case e := <-events:
			if filepath.Base(e.Name) == filepath.Base(s.Node.Config.Keyring()) && s.Node.Unlocker.Changed(ctx) {
				s.Node.Log.Info("the stored keyring has changed: reading it again")
				s.Node.Unlocker.Nudge()
			}
		}
	}
}

// watchFolder watches the folder, because files in it are replaced rather than written
// to. Without a watch there is still SIGHUP.
func (s *Server) watchFolder() (<-chan fsnotify.Event, <-chan error, func()) {
	w, err := fsnotify.NewWatcher()
	if err == nil {
		err = w.Add(s.Node.Config.State.Dir)
	}
	if err != nil {
		s.Node.Log.Warn("the state folder can't be watched; send SIGHUP after a change of the keyring", "error", err)
		return nil, nil, func() {}
	}
	return w.Events, w.Errors, func() { _ = w.Close() }
}
