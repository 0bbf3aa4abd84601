package replica

import (
	"context"
	"errors"

	"github.com/beezy-dev/kleidi/seal/keyring"
)

// An operator carries keyrings to and from a node without access to the cluster store.
// The Replica of such a node needs no Store.

// Import takes a keyring that an operator carried here, by the same rules as a round
// takes the keyring in the store. It then opens and seals a staged KEK. followed says
// that the keyring was newer than the node's. The error is [keyring.ErrOlder] for an
// older one.
func (r *Replica) Import(ctx context.Context, remote *keyring.Untrusted) (followed bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for range rounds {
		switch err := r.cfg.Unlocker.Follow(ctx, remote, nil); {
		case err == nil:
			followed = true
		case errors.Is(err, keyring.ErrInStep):
			return followed, r.acknowledge(ctx)
		case errors.Is(err, keyring.ErrNotAcknowledged):
			if err := r.acknowledge(ctx); err != nil {
				return followed, err
			}
		case !errors.Is(err, keyring.ErrStagedClosed):
			return followed, err
		default:
			if err := r.cfg.Unlocker.OpenStaged(ctx); err != nil {
				return followed, err
			}
		}
	}
	return followed, errors.New("the keyring changes faster than this node follows")
}

// Export returns the shared keyring of this node, and the node's record.
func (r *Replica) Export(ctx context.Context) (shared, record []byte, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	k, err := r.cfg.Unlocker.Keyring()
	if err != nil {
		return nil, nil, err
	}
	self, ok := k.Self()
	if shared = k.Shared(); shared == nil || !ok {
		return nil, nil, errors.New("only this node uses the keyring, so there is nothing to export; the first kleidi node approve NAME lets nodes share it")
	}
	record, err = r.sign(ctx, k, self.Name, nil)
	return shared, record, err
}

// PutRecord puts a carried record of another node into the store.
func (r *Replica) PutRecord(ctx context.Context, node string, record []byte) error {
	return r.cfg.Store.PutRecord(ctx, node, record)
}
