package clusteraccess

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// Store is the cluster store, as soon as its kubeconfig exists. kleidi starts before the
// cluster, so a missing or wrong kubeconfig is read again at the next call.
type Store struct {
	access *Access

	mu   sync.Mutex
	open *kube.Store
}

// Store returns the cluster store over this access.
func (a *Access) Store() *Store { return &Store{access: a} }

func (c *Store) store() (*kube.Store, error) {
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
func (c *Store) Load(ctx context.Context) ([]byte, error) {
	s, err := c.store()
	if err != nil {
		return nil, err
	}
	return s.Load(ctx)
}

// Swap implements replica.Store.
func (c *Store) Swap(ctx context.Context, old, next []byte) error {
	s, err := c.store()
	if err != nil {
		return err
	}
	return s.Swap(ctx, old, next)
}

// Records implements replica.Store.
func (c *Store) Records(ctx context.Context, nodes ...string) ([]store.NodeRecord, error) {
	s, err := c.store()
	if err != nil {
		return nil, err
	}
	return s.Records(ctx, nodes...)
}

// PutRecord implements replica.Store.
func (c *Store) PutRecord(ctx context.Context, node string, record []byte) error {
	s, err := c.store()
	if err != nil {
		return err
	}
	return s.PutRecord(ctx, node, record)
}

// Archive implements node.Archives.
func (c *Store) Archive(ctx context.Context, keyID string) ([]byte, error) {
	s, err := c.store()
	if err != nil {
		return nil, err
	}
	return s.Archive(ctx, keyID)
}

// CreateArchive implements node.Archives.
func (c *Store) CreateArchive(ctx context.Context, keyID string, archive []byte) error {
	s, err := c.store()
	if err != nil {
		return err
	}
	return s.CreateArchive(ctx, keyID, archive)
}

// watchAgain is how often Watch looks for a kubeconfig that was missing or wrong.
const watchAgain = 2 * time.Second

// Watch implements replica.Store. It begins to watch once there is a kubeconfig.
func (c *Store) Watch(ctx context.Context, changed func()) {
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

// summarizeRecord describes a record in the columns of kubectl get keyringnodes. The
// endorsement key is that of the node in the store's keyring.
func summarizeRecord(record, inStore []byte) map[string]any {
	u, err := keyring.ParseRecord(record)
	if err != nil {
		return map[string]any{}
	}
	r := u.Claims()
	s := map[string]any{
		"revision": r.Revision, "anchored": r.Anchored, "announced": r.Announced, "encrypted": r.Encrypted, "acknowledged": r.Acknowledged,
		"bootStates": len(r.BootStates), "started": r.Started.UTC().Format(time.RFC3339), "version": r.Version, "problem": r.Problem,
	}
	if k, err := keyring.Parse(inStore); err == nil {
		for _, n := range k.Info().Nodes {
			if n.Name == u.Node() {
				s["ek"] = n.EK
			}
		}
	}
	return s
}
