package replica

import (
	"context"
	"errors"
	"io/fs"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
)

// Removal is where a node keeps the keyring that removed it. Once the others have a KEK
// that the node does not know, the store tells it nothing that it can verify.
type Removal interface {
	// Load returns the keyring. The error is fs.ErrNotExist if there is none.
	Load(context.Context) ([]byte, store.Version, error)
	Save(ctx context.Context, b []byte, old store.Version) (store.Version, error)
}

// remove remembers that a keyring of this node's own KEK removed it, and returns why the
// node is removed, or err if it is not. A round that ends in step proves the opposite.
func (r *Replica) remove(ctx context.Context, k *keyring.Keyring, err error) error {
	if err == nil {
		r.removed = nil
		return nil
	}
	if seal.CauseOf(err) == seal.CauseNodeRemoved {
		if r.removed == nil {
			r.saveRemoval(ctx)
		}
		r.removed = err
	} else if r.removed == nil && !r.everInStep {
		r.removed = r.loadRemoval(ctx, k)
	}
	if r.removed != nil {
		return r.removed
	}
	return err
}

func (r *Replica) saveRemoval(ctx context.Context) {
	if r.cfg.Removal == nil {
		return
	}
	_, version, err := r.cfg.Removal.Load(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		version, err = "", nil
	}
	if err == nil {
		_, err = r.cfg.Removal.Save(ctx, r.last, version)
	}
	if err != nil { // the next start can still read it from the store, unless the KEK was rotated
		r.cfg.Log.Warn("this node is removed, and can't keep that on its disk", "error", err)
	}
}

// loadRemoval returns nil if there is no keyring on the disk that removes this node. One
// from before the node joined again is older than the node's keyring.
func (r *Replica) loadRemoval(ctx context.Context, k *keyring.Keyring) error {
	if r.cfg.Removal == nil {
		return nil
	}
	b, _, err := r.cfg.Removal.Load(ctx)
	if err != nil {
		return nil
	}
	remote, err := keyring.Parse(b)
	if err != nil {
		return nil
	}
	if err := keyring.Follows(k, remote); seal.CauseOf(err) == seal.CauseNodeRemoved {
		return err
	}
	return nil
}
