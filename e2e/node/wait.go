package kubernetes

import (
	"testing"
	"time"
)

// reconnect is how long kube-apiserver may take to notice that a plugin is back: gRPC's
// back-off ends at 92 s, the probe adds 10 s.
const reconnect = 150 * time.Second

// eventually asks until ready returns nil, and fails the test when that has not
// happened within the time.
func eventually(t *testing.T, within time.Duration, what string, ready func() error) {
	t.Helper()
	start := time.Now()
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready()
		if err == nil {
			t.Logf("%s: after %s", what, time.Since(start).Round(100*time.Millisecond))
			return
		}
		select {
		case <-deadline.C:
			t.Fatalf("%s: not within %s: %v", what, within, err)
		case <-tick.C:
		}
	}
}
