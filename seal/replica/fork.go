package replica

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

// Publish replaces the keyring in the store with this node's, because an operator says
// so. The KEKs of a fork's keyring become retired KEKs of this node's keyring. With
// discard, for a keyring that no node takes, they are dropped.
func (r *Replica) Publish(ctx context.Context, mem seal.Memory, discard bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	k, err := r.cfg.Unlocker.Keyring()
	if err != nil {
		return err
	}
	if k.Info().Commit != keyring.CommitCluster {
		return errors.New("the keyring is not in the cluster store yet; the node with the seat hands it over")
	}
	raw, err := r.cfg.Store.Load(ctx)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return seal.Errorf(seal.CauseUnavailable, hintStore, "the cluster store: %w", err)
	}
	next, err := r.after(ctx, mem, k, raw, discard)
	if err != nil {
		return err
	}
	defer r.Kick()
	return unlock.Resolve(ctx, r.cfg.Unlocker, func(now *keyring.Keyring) (*keyring.Keyring, error) {
		if now.Revision() != k.Revision() {
			next.Close()
			return nil, errors.New("the keyring has changed meanwhile; run the command again")
		}
		return next, nil
	}, func(ctx context.Context, next *keyring.Keyring) error {
		return r.cfg.Store.Swap(ctx, raw, next.Shared())
	})
}

// after returns the revision of k that replaces the store's keyring.
func (r *Replica) after(ctx context.Context, mem seal.Memory, k *keyring.Keyring, raw []byte, discard bool) (*keyring.Keyring, error) {
	if raw == nil {
		return k.AtLeast(0)
	}
	remote, err := keyring.Parse(raw)
	if err != nil && !discard {
		return nil, seal.WithHint(fmt.Errorf("the cluster store: %w", err), hintDiscard)
	}
	if err != nil {
		return k.AtLeast(0)
	}
	switch err := keyring.Follows(k, remote); {
	case err == nil:
		return nil, errors.New("the cluster store holds a newer keyring, which this node will take; there is nothing to publish")
	case errors.Is(err, keyring.ErrNotAcknowledged), errors.Is(err, keyring.ErrStagedClosed):
		return nil, seal.WithHint(fmt.Errorf("the cluster store holds a newer keyring, which this node takes once it has opened and sealed its KEK: %w", err), "see kleidi status")
	case errors.Is(err, keyring.ErrInStep):
		return k.AtLeast(0)
	}
	if discard && seal.CauseOf(keyring.Precedes(remote, k)) != seal.CauseForked { // its revision may be anything
		return k.AtLeast(0)
	}
	if discard {
		return k.AtLeast(remote.Revision() + 1)
	}
	other, err := unlock.OpenFork(ctx, r.cfg.Unlocker, mem, remote)
	if err != nil {
		return nil, seal.WithHint(fmt.Errorf("the cluster store: %w", err), hintDiscard)
	}
	defer other.Close()
	return keyring.Absorb(k, other, time.Now())
}

const hintDiscard = "if no node takes that keyring, replace it with kleidi keyring publish --discard; what is encrypted under KEKs that only it holds is then lost"

// ImportTrusted takes a carried keyring whose current KEK this node holds, because an
// operator vouches for it, and seals that KEK for this node.
func (r *Replica) ImportTrusted(ctx context.Context, mem seal.Memory, remote *keyring.Untrusted, trusted seal.KeyID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	defer r.Kick()
	return unlock.Resolve(ctx, r.cfg.Unlocker, func(k *keyring.Keyring) (*keyring.Keyring, error) {
		other, err := keyring.FollowTrusted(k, remote, trusted, mem)
		if err != nil {
			return nil, err
		}
		defer other.Close()
		self, _ := k.Self()
		var slots []seal.Slot
		if len(k.OwnSlots()) > 0 {
			if slots, err = r.cfg.Wrap(ctx, k, other.KEK()); err != nil {
				return nil, fmt.Errorf("seal the KEK: %w", err)
			}
		}
		return other.OnNode(self.Name, slots, nil)
	}, nil)
}
