package node

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/beezy-dev/kleidi/internal/clusteraccess"
	"github.com/beezy-dev/kleidi/internal/version"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// Carrier returns what takes and gives carried keyrings on this node, which may have no
// cluster store.
func Carrier(n *Node) *replica.Replica {
	if n.Replica != nil {
		return n.Replica
	}
	return replicaOver(n, nil)
}

func replicaOver(n *Node, s replica.Store) *replica.Replica {
	return replica.New(replica.Config{
		Store: s, Unlocker: n.Unlocker, Wrap: wrapStaged(n), BootStates: func(ctx context.Context, k *keyring.Keyring) ([]keyring.RecordedState, error) {
			own, err := n.Unrevoked(ctx, k.OwnSlots())
			if err != nil {
				return nil, err
			}
			return n.View.RecordStates(own, k.ClusterID())
		}, Removal: n.State.File(n.Config.Removal()), Version: version.String(), Log: n.Log,
	})
}

// wrapStaged seals the staged KEK for each boot state that this node's own slots of the
// current KEK are for.
func wrapStaged(n *Node) func(context.Context, *keyring.Keyring, *seal.Secret) ([]seal.Slot, error) {
	return func(ctx context.Context, k *keyring.Keyring, kek *seal.Secret) ([]seal.Slot, error) {
		own, err := n.Unrevoked(ctx, k.OwnSlots())
		if err != nil {
			return nil, err
		}
		slots, err := rotation.Like(n.ProvenRewrappers(k), own)(ctx, kek)
		if err == nil {
			err = rotation.ProveTryable(ctx, kek, slots, n.Openers())
		}
		return slots, err
	}
}

// clusterStore is the cluster store once its kubeconfig is there. kleidi starts before the
// cluster, so a kubeconfig that is missing or wrong is read again at the next call.
type clusterStore struct {
	access *clusteraccess.Access

	mu   sync.Mutex
	open *kube.Store
}

func (c *clusterStore) store() (*kube.Store, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open != nil {
		return c.open, nil
	}
	// A missing file must not look like a store without a keyring, so the error is not
	// wrapped.
	client, err := c.access.Client()
	if err != nil {
		return nil, fmt.Errorf("%w: cluster.kubeconfig: %v", replica.ErrNoStore, err)
	}
	c.open = &kube.Store{Client: client, Summary: summarize, RecordSummary: summarizeRecord}
	return c.open, nil
}

// Load implements replica.Store.
func (c *clusterStore) Load(ctx context.Context) ([]byte, error) {
	s, err := c.store()
	if err != nil {
		return nil, err
	}
	return s.Load(ctx)
}

// Swap implements replica.Store.
func (c *clusterStore) Swap(ctx context.Context, old, next []byte) error {
	s, err := c.store()
	if err != nil {
		return err
	}
	return s.Swap(ctx, old, next)
}

// Records implements replica.Store.
func (c *clusterStore) Records(ctx context.Context, nodes ...string) ([]store.NodeRecord, error) {
	s, err := c.store()
	if err != nil {
		return nil, err
	}
	return s.Records(ctx, nodes...)
}

// PutRecord implements replica.Store.
func (c *clusterStore) PutRecord(ctx context.Context, node string, record []byte) error {
	s, err := c.store()
	if err != nil {
		return err
	}
	return s.PutRecord(ctx, node, record)
}

// watchAgain is how often Watch looks for a kubeconfig that was missing or wrong.
const watchAgain = 2 * time.Second

// Watch implements replica.Store. It watches from when there is a kubeconfig.
func (c *clusterStore) Watch(ctx context.Context, changed func()) {
	for ctx.Err() == nil {
		if s, err := c.store(); err == nil {
			s.Watch(ctx, changed)
		}
		select {
		case <-ctx.Done():
		case <-time.After(watchAgain):
		}
	}
}

// summarize describes a keyring in the columns of kubectl get keyrings.
func summarize(b []byte) map[string]any {
	u, err := keyring.Parse(b)
	if err != nil {
		return map[string]any{}
	}
	i := u.Info()
	s := map[string]any{"revision": i.Revision, "current": i.Current.KeyID, "nodes": len(i.Nodes)}
	if i.Staged != nil {
		s["staged"] = i.Staged.KeyID
	}
	return s
}

// summarizeRecord describes a record in the columns of kubectl get keyringnodes.
func summarizeRecord(b []byte) map[string]any {
	u, err := keyring.ParseRecord(b)
	if err != nil {
		return map[string]any{}
	}
	r := u.Claims()
	return map[string]any{
		"revision": r.Revision, "anchored": r.Anchored, "announced": r.Announced, "acknowledged": r.Acknowledged, "version": r.Version, "problem": r.Problem,
	}
}
