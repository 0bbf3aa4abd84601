// Package supervise keeps a part of a daemon running.
package supervise

import (
	"context"
	"log/slog"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// Keep runs f until ctx ends, and runs it again a while after a failure: an operator
// can repair a missing folder or a taken port without a restart.
func Keep(ctx context.Context, log *slog.Logger, what string, f func() error) {
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = 200*time.Millisecond, 15*time.Second
	for ctx.Err() == nil {
		err := f()
		if err == nil || ctx.Err() != nil {
			return
		}
		d := wait.NextBackOff()
		log.Error(what+" failed", "error", err, "retry", d.Round(time.Millisecond))
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
	}
}
