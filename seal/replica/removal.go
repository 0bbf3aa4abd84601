package replica

import (
	"context"
	"errors"
	"io/fs"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// remove remembers that a keyring under this node's own KEK has removed the node. It
// returns the reason, or err if the node is not removed. A round that ends in step proves
// that the node is not removed.
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

// forgetRemoval forgets a removal that has been undone: a store that was restored lists the
// node again. With the file still there, the node's next start without the API would lock.
func (r *Replica) forgetRemoval(ctx context.Context) {
	if r.cfg.Removal == nil {
		return
	}
	_, _, err := r.cfg.Removal.Load(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err := r.cfg.Removal.Remove(ctx); err != nil {
		r.cfg.Log.Warn("this node is no longer removed, but can't delete the record of its removal", "error", err)
	}
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
		r.cfg.Log.Warn("this node was removed, but can't record that on its disk", "error", err)
	}
}

// loadRemoval returns nil if no keyring on the disk removes this node. A keyring that was
// saved before the node joined again is older than the node's keyring, and does not count.
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
