package unlock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
)

// Change saves what f makes of the open keyring, one revision after the other,
// and announces the last. If it fails before the first is saved, nothing has
// changed. After that a new revision is on disk, and Run, which is nudged, opens
// it. f closes what it made when it fails.
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
	return u.commit(ctx, revisions, Opener{}, u.anchor)
}

// Adopt does the same with revisions of a keyring that was opened in another way,
// by the recovery identity for instance; by says how. version is that of the stored keyring
// that they replace.
func (u *Unlocker) Adopt(ctx context.Context, version store.Version, by Opener, revisions []*keyring.Keyring) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.version = version
	return u.commit(ctx, revisions, by, func(ctx context.Context, k *keyring.Keyring) error { return u.cfg.Anchor.Replace(ctx, k.Anchor()) })
}

func (u *Unlocker) commit(ctx context.Context, revisions []*keyring.Keyring, by Opener, anchor func(context.Context, *keyring.Keyring) error) error {
	ctx = context.WithoutCancel(ctx) // from here on it is carried to its end
	last := revisions[len(revisions)-1]
	for _, k := range revisions {
		if k != last {
			defer k.Close()
		}
	}
	if err := u.save(ctx, revisions, anchor); err != nil {
		last.Close()
		return err
	}
	unsettled := u.settle(ctx, last)
	u.announce(last, by, Timing{})
	if unsettled != nil {
		return fmt.Errorf("the new keyring is saved and in use; %w", u.again(unsettled))
	}
	return nil
}

func (u *Unlocker) save(ctx context.Context, revisions []*keyring.Keyring, anchor func(context.Context, *keyring.Keyring) error) error {
	for _, k := range revisions {
		version, err := u.cfg.Store.Save(ctx, k.Marshal(), u.version)
		if errors.Is(err, store.ErrConflict) {
			return seal.Errorf(seal.CauseStore, "run kleidi status, then try again", "the stored keyring was changed by someone else; it is read anew: %w", u.again(err))
		}
		if err != nil {
			return storeError("keyring", u.again(err))
		}
		u.version = version
	}
	if err := anchor(ctx, revisions[len(revisions)-1]); err != nil {
		return fmt.Errorf("the new keyring is saved and not yet announced: %w", u.again(err))
	}
	return nil
}

// again nudges Run, for what is on disk may differ from what is open.
func (u *Unlocker) again(err error) error {
	u.Nudge()
	return err
}

// whileOpen puts the best remedy first where what is stored is gone, damaged or
// another keyring, and what is open is whole.
func (u *Unlocker) whileOpen(ctx context.Context, err error) error {
	e, ok := errors.AsType[*seal.Error](err)
	if u.open.Load() == nil || !ok {
		return err
	}
	_, version, loadErr := u.cfg.Store.Load(ctx)
	if loadErr == nil && version == u.version && e.Cause != seal.CauseAnchor {
		return err // the stored keyring is the open one: something else is wrong
	}
	return &seal.Error{Cause: e.Cause, Err: e.Err, Hint: hintSave + "; or, if the change was yours: " + e.Hint}
}

const hintSave = "store the open one again with kleidi keyring save, and don't restart kleidi serve before"

// Save stores the open keyring in the place of whatever is stored.
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
	if err := u.cfg.Anchor.Replace(ctx, k.Anchor()); err != nil { // what is open vouches for it
		return err
	}
	s := u.State()
	s.Problem, s.Attempts = nil, 0
	u.state.Store(&s)
	u.Nudge()
	return nil
}
