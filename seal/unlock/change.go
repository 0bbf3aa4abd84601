package unlock

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"reflect"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
)

// Change calls f with the open keyring, saves the revisions that f returns, one after
// the other, and announces the last one. If Change fails before it has saved the first
// revision, nothing has changed. If it fails later, a new revision is on disk, and
// Change nudges Run to open it. If f fails, it closes the keyrings that it made.
// Change refuses a new revision of the shared keyring on a node that does not have the
// seat.
func (u *Unlocker) Change(ctx context.Context, f func(*keyring.Keyring) ([]*keyring.Keyring, error)) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	k, err := u.Keyring()
	if err != nil {
		return err
	}
	revisions, err := f(k)
	if err != nil {
		return err
	}
	if last := revisions[len(revisions)-1]; last.Revision() > k.Revision() {
		if err := keyring.CheckSeat(k); err != nil {
			for _, next := range revisions {
				next.Close()
			}
			return err
		}
	}
	if err := restage(ctx, u, k, revisions); err != nil {
		for _, next := range revisions {
			next.Close()
		}
		return err
	}
	return u.commit(ctx, SlotChange{Before: k}, revisions, Opener{}, u.anchor, inCluster(u))
}

// restage replaces the node's own slots of the staged KEK in the last of revisions, if
// the own slots of the current KEK have changed. The former staged slots may be revoked,
// or may be for boots that no longer happen. Without a wrapper there are no new slots:
// the node then withdraws its acknowledgement, and seals the KEK again in the next round
// of package replica.
func restage(ctx context.Context, u *Unlocker, before *keyring.Keyring, revisions []*keyring.Keyring) error {
	last := revisions[len(revisions)-1]
	kek := keyring.StagedKEK(last)
	if kek == nil || len(last.OwnStagedSlots()) == 0 || sameSlots(before.OwnSlots(), last.OwnSlots()) || !sameSlots(before.OwnStagedSlots(), last.OwnStagedSlots()) {
		return nil
	}
	var slots []seal.Slot
	if u.cfg.WrapStaged != nil {
		var err error
		if slots, err = u.cfg.WrapStaged(ctx, last, kek); err != nil {
			return fmt.Errorf("seal the staged KEK as the current one: %w", err)
		}
	}
	next, err := last.WithOwnSlots(last.OwnSlots(), slots)
	if err != nil {
		return err
	}
	last.Close()
	revisions[len(revisions)-1] = next
	return nil
}

func sameSlots(a, b []seal.Slot) bool { return reflect.DeepEqual(a, b) }

// inCluster returns the function that commits a revision in the cluster store, for a
// keyring whose changes count as made there.
func inCluster(u *Unlocker) committing {
	return func(ctx context.Context, old, next *keyring.Keyring) error {
		switch {
		case next.Info().Commit != keyring.CommitCluster || bytes.Equal(old.Shared(), next.Shared()):
			return nil
		case u.cfg.Commit == nil:
			return seal.Errorf(seal.CauseConfiguration, "set cluster.kubeconfig, or run the command on a node where it is set", "the change is of what all nodes share, and this node has no access to the cluster store")
		}
		return u.cfg.Commit(ctx, old, next)
	}
}

// Adopt saves and announces revisions as Change does. They are revisions of the keyring
// from, which the caller opened, for instance with the recovery identity; by says how.
// version is the version of the stored keyring that they replace.
func (u *Unlocker) Adopt(ctx context.Context, version store.Version, by Opener, from *keyring.Keyring, revisions []*keyring.Keyring) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.version = version
	return u.commit(ctx, SlotChange{Before: from}, revisions, by, func(ctx context.Context, k *keyring.Keyring) error { return u.cfg.Anchor.Replace(ctx, k.Anchor()) }, notInCluster)
}

// notInCluster commits nothing: the revision is in the cluster store already, or will be
// published there.
func notInCluster(context.Context, *keyring.Keyring, *keyring.Keyring) error { return nil }

func (u *Unlocker) commit(ctx context.Context, change SlotChange, revisions []*keyring.Keyring, by Opener, anchor anchoring, cluster committing) error {
	ctx = context.WithoutCancel(ctx) // a change that has begun is not interrupted
	last := revisions[len(revisions)-1]
	for _, k := range revisions {
		if k != last {
			defer k.Close()
		}
	}
	change.After = last
	err := tell(ctx, u.cfg.Witness, change)
	if err == nil {
		err = u.save(ctx, revisions, anchor, cluster)
	}
	if err != nil {
		last.Close()
		return err
	}
	unsettled := u.settle(ctx, last)
	u.announce(last, by, Timing{})
	if u.cfg.Witness != nil { // not earlier: until here the former keyring is the open one
		u.cfg.Witness.Changed(ctx)
	}
	if unsettled != nil {
		return fmt.Errorf("the new keyring is saved and in use; %w", u.nudged(unsettled))
	}
	return nil
}

// tell tells a witness, if there is one, of an upcoming change.
func tell(ctx context.Context, w Witness, change SlotChange) error {
	if w == nil {
		return nil
	}
	return w.Changing(ctx, change)
}

// anchoring saves the anchor of a keyring; committing puts a revision into the cluster
// store.
type (
	anchoring  func(context.Context, *keyring.Keyring) error
	committing func(ctx context.Context, old, next *keyring.Keyring) error
)

func (u *Unlocker) save(ctx context.Context, revisions []*keyring.Keyring, anchor anchoring, cluster committing) error {
	old := u.open.Load()
	for i, k := range revisions {
		if err := cluster(ctx, old, k); err != nil && i > 0 {
			return fmt.Errorf("revision %d is made; of the one after it: %w", old.Revision(), u.nudged(err))
		} else if err != nil {
			return err
		}
		old = k
		version, err := u.cfg.Store.Save(ctx, k.Marshal(), u.version)
		if errors.Is(err, store.ErrConflict) {
			return seal.Errorf(seal.CauseStore, "run kleidi status, then try again", "the stored keyring was changed by someone else; kleidi reads it again: %w", u.nudged(err))
		}
		if err != nil {
			return storeError("keyring", u.nudged(err))
		}
		u.version = version
	}
	if err := anchor(ctx, revisions[len(revisions)-1]); err != nil {
		return fmt.Errorf("the new keyring is saved but not yet announced: %w", u.nudged(err))
	}
	return nil
}

// nudged nudges Run, because the stored keyring may differ from the open one. It
// returns err.
func (u *Unlocker) nudged(err error) error {
	u.Nudge()
	return err
}

// whileOpen adds a better remedy to err if a keyring is open and the stored keyring is
// missing, damaged or a different one: to store the open keyring again.
func (u *Unlocker) whileOpen(ctx context.Context, err error) error {
	e, ok := errors.AsType[*seal.Error](err)
	if u.open.Load() == nil || !ok {
		return err
	}
	_, version, loadErr := u.cfg.Store.Load(ctx)
	if loadErr == nil && version == u.version && e.Cause != seal.CauseAnchor {
		return err // the stored keyring is the open one, so something else is wrong
	}
	better := *e
	better.Hint = hintSave + "; or, if the change was yours: " + e.Hint
	if e.NoRecovery != "" {
		better.NoRecovery = hintSave + "; or, if the change was yours: " + e.NoRecovery
	}
	return &better
}

// Save replaces the stored keyring, whatever it is, with the open one.
func (u *Unlocker) Save(ctx context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	k, err := u.Keyring()
	if err != nil {
		return err
	}
	_, version, err := u.cfg.Store.Load(ctx)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return seal.Errorf(seal.CauseStore, "move that file away, then run the command again", "the stored keyring: %w", err)
	}
	ctx = context.WithoutCancel(ctx)
	if u.version, err = u.cfg.Store.Save(ctx, k.Marshal(), version); err != nil {
		return storeError("keyring", err)
	}
	if err := u.cfg.Anchor.Replace(ctx, k.Anchor()); err != nil { // the open keyring vouches for it
		return err
	}
	s := u.State()
	s.Problem, s.Attempts = nil, 0
	u.state.Store(&s)
	u.Nudge()
	return nil
}
