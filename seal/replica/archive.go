package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

// Unarchive commits the revision that f returns, in which an archived KEK is a retired
// one again. If the store was restored from before the KEK was pruned, it holds an older
// keyring, perhaps under that very KEK. The new revision replaces it.
func (r *Replica) Unarchive(ctx context.Context, f func(*keyring.Keyring) (*keyring.Keyring, error)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	raw, err := r.cfg.Store.Load(ctx)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return seal.Errorf(seal.CauseUnavailable, hintStore, "the cluster store: %w", err)
	}
	defer r.Kick()
	return unlock.Resolve(ctx, r.cfg.Unlocker, func(k *keyring.Keyring) (*keyring.Keyring, error) {
		next, err := f(k)
		if err != nil {
			return nil, err
		}
		if raw == nil || bytes.Equal(raw, k.Shared()) {
			return next, nil
		}
		remote, err := keyring.Parse(raw)
		if err == nil {
			err = keyring.Precedes(remote, next)
		}
		if err != nil {
			next.Close()
			return nil, fmt.Errorf("the cluster store: %w", err)
		}
		return next, nil
	}, func(ctx context.Context, next *keyring.Keyring) error {
		return r.cfg.Store.Swap(ctx, raw, next.Shared())
	})
}
