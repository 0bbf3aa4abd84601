package serve

import (
	"context"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/beezy-dev/kleidi/grpcserver"
)

// pings is how many pings fit into WatchdogSec=, so that systemd ends only a serve that has
// missed several.
const pings = 4

// feedWatchdog tells systemd that the KMS socket answers, if the unit has a watchdog.
func (s *Server) feedWatchdog(ctx context.Context) {
	within, err := daemon.SdWatchdogEnabled(false)
	if err != nil || within == 0 {
		return
	}
	tick := time.NewTicker(within / pings)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		s.feedOnce(ctx, within/pings)
	}
}

// feedOnce asks the KMS socket itself, since a loop that only counts time goes on in a serve
// that hangs. A locked serve answers, and a restart would not open it.
func (s *Server) feedOnce(ctx context.Context, timeout time.Duration) {
	limited, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := grpcserver.Ping(limited, s.Node.Config.KMS.Socket); err != nil {
		if ctx.Err() == nil {
			s.Node.Log.Warn("the KMS socket does not answer the watchdog", "error", err)
		}
		return
	}
	_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog)
}
