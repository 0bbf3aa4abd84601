package members

import (
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/replica/storetest"
)

// TestApproveHandsOver: the first approval makes the keyring one for several nodes, and the
// seat hands it over to the cluster store at once. It does not wait until the next read of
// the store is due, half a minute later.
func TestApproveHandsOver(t *testing.T) {
	n, d := seat(t, func(c *config.Config) { c.Cluster.Kubeconfig = filepath.Join(c.State.Dir, "unused") })
	beta := machine(t, "beta")
	first := make(chan struct{}, 1)
	n.Replica = replica.New(replica.Config{Store: &storetest.Memory{}, Unlocker: n.Unlocker, Log: slog.New(inStep{slog.DiscardHandler, first})})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); n.Replica.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	<-first
	next := n.Replica.Round()
	approve(t, d, beta)
	select {
	case <-next:
	case <-time.After(25 * time.Second):
		t.Fatal("no round follows the approval")
	}
	if s := n.Replica.State(); !s.InStep || s.Problem != nil {
		t.Fatalf("after the approval: %+v", s)
	}
}

// inStep tells when a replica says that it is in step.
type inStep struct {
	slog.Handler
	said chan<- struct{}
}

func (h inStep) Enabled(context.Context, slog.Level) bool { return true }

func (h inStep) Handle(_ context.Context, r slog.Record) error {
	if strings.HasPrefix(r.Message, "in step") {
		select {
		case h.said <- struct{}{}:
		default:
		}
	}
	return nil
}
