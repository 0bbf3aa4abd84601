// Package rotation changes the KEK of a keyring and the slots that hold it.
//
// Its functions return new keyrings and save none, so a change that fails half-way
// has no effect. A [Driver] makes its changes through its [Cluster].
package rotation

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// Rewrapper can wrap a KEK in the same way as an authenticated slot: for the same boot
// state, key or recipients.
type Rewrapper interface {
	// WrapLike wraps kek in the same way as the slot like. The error is
	// seal.ErrNotMine if another wrapper made that slot.
	WrapLike(ctx context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error)
}

// Wrap returns the slots of a KEK.
type Wrap func(ctx context.Context, kek *seal.Secret) ([]seal.Slot, error)

// Like returns a Wrap that wraps a KEK once for each of slots, in the same way as that
// slot. The Wrap fails if no wrapper can do so for one of them: the new KEK must not
// have fewer slots than the old one.
func Like(wrappers []Rewrapper, slots []seal.Slot) Wrap {
	return func(ctx context.Context, kek *seal.Secret) ([]seal.Slot, error) {
		out := make([]seal.Slot, 0, len(slots))
		for _, s := range slots {
			w, err := wrapLike(ctx, wrappers, kek, s)
			if err != nil {
				return nil, &SlotError{s, err}
			}
			out = append(out, w)
		}
		return out, nil
	}
}

// SlotError names a slot for which no wrapper could wrap the new KEK in the same way.
type SlotError struct {
	Slot seal.Slot
	Err  error
}

// Error implements error.
func (e *SlotError) Error() string {
	return fmt.Sprintf("wrap the new KEK for the %s slot: %v", e.Slot.Type, e.Err)
}

// Unwrap returns the reason.
func (e *SlotError) Unwrap() error { return e.Err }

func wrapLike(ctx context.Context, wrappers []Rewrapper, kek *seal.Secret, like seal.Slot) (seal.Slot, error) {
	for _, w := range wrappers {
		s, err := w.WrapLike(ctx, kek, like)
		if !errors.Is(err, seal.ErrNotMine) {
			return s, err
		}
	}
	return seal.Slot{}, seal.Errorf(seal.CauseNoSlot, "configure the wrapper of that slot", "no configured wrapper made it")
}

// Rotate returns the revisions of a rotation on one node. The caller saves them in this
// order: in the first one a fresh KEK is staged; in the second one it is the current
// KEK, and the former current KEK is retired. The first revision stays on disk as the
// previous one, so that the fresh KEK is never in a single file only. If an
// interrupted rotation left a KEK staged, a revision that retires that KEK comes
// before these two. Rotate opens every new slot that can be opened here now.
func Rotate(ctx context.Context, mem seal.Memory, k *keyring.Keyring, wrap Wrap, opener []seal.Wrapper, now time.Time) (revisions []*keyring.Keyring, err error) {
	defer func() {
		if err != nil {
			closeAll(revisions)
			revisions = nil
		}
	}()
	if k.StagedID() != "" {
		if k, err = unstage(k, now); err != nil {
			return nil, err
		}
		revisions = append(revisions, k)
	}
	kek, err := mem.NewKEK()
	if err != nil {
		return revisions, err
	}
	staged, err := stage(ctx, k, kek, wrap, opener, now)
	if err != nil {
		kek.Close()
		return revisions, err
	}
	revisions = append(revisions, staged)
	active, err := staged.Activate(now)
	if err != nil {
		return revisions, err
	}
	return append(revisions, active), nil
}

func closeAll(revisions []*keyring.Keyring) {
	for _, k := range revisions {
		k.Close()
	}
}

// unstage ends an interrupted rotation. A staged KEK that does not open was sealed to a
// boot state that has passed, and no node has announced it.
func unstage(k *keyring.Keyring, now time.Time) (*keyring.Keyring, error) {
	if k.Holds(k.StagedID()) {
		return k.Abort(now)
	}
	return k.GiveUpStaged()
}

func stage(ctx context.Context, k *keyring.Keyring, kek *seal.Secret, wrap Wrap, opener []seal.Wrapper, now time.Time) (*keyring.Keyring, error) {
	slots, err := wrap(ctx, kek)
	if err != nil {
		return nil, err
	}
	if err := prove(ctx, kek, slots, opener, untryable); err != nil {
		return nil, err
	}
	self, _ := k.Self()
	own, common := slots[:0:0], slots[:0:0]
	for _, s := range slots {
		if k.Format() > 1 && s.Node != "" && s.Node == self.Name {
			own = append(own, s) // they are in the node's own section, not in the shared keyring
		} else {
			common = append(common, s)
		}
	}
	next, err := k.Stage(kek, common, now)
	if err != nil || len(own) == 0 {
		return next, err
	}
	defer next.Close()
	return next.WithOwnSlots(k.OwnSlots(), own)
}

// Complete activates the staged KEK that an interrupted rotation left behind, if a
// wrapper opens it. If a later revision was lost, seeds may have been encrypted under
// that KEK. Complete returns k itself if no KEK is staged or no opener made a staged
// slot, and an error if the staged KEK does not open.
func Complete(ctx context.Context, k *keyring.Keyring, opener []seal.Wrapper, now time.Time) (*keyring.Keyring, error) {
	staged, err := OpenStaged(ctx, k, opener)
	if err != nil {
		return nil, err
	}
	if staged != k {
		defer staged.Close()
	}
	if id := staged.StagedID(); id == "" || !staged.Holds(id) {
		return k, nil
	}
	return staged.Activate(now)
}

// OpenStaged returns k with its staged KEK open, if a wrapper opens it. It returns k itself
// if that KEK is open, if none is staged, or if no opener made a staged slot, and an error if
// the staged KEK does not open.
func OpenStaged(ctx context.Context, k *keyring.Keyring, opener []seal.Wrapper) (*keyring.Keyring, error) {
	if id := k.StagedID(); id != "" && k.Holds(id) {
		return k, nil
	}
	var refusal error
	for _, s := range k.StagedSlots() {
		for _, w := range opener {
			kek, err := w.Unwrap(ctx, s)
			if errors.Is(err, seal.ErrNotMine) {
				continue
			}
			if err != nil {
				refusal = cmp.Or(refusal, fmt.Errorf("the staged KEK does not open: %w", err))
				continue
			}
			staged, err := k.OpenStaged(kek)
			if err != nil {
				kek.Close()
				return nil, err
			}
			return staged, nil
		}
	}
	if refusal != nil {
		return nil, refusal
	}
	return k, nil
}

// ProveTryable is Prove for the slots that can be tried. It passes over a slot for
// another boot state than the present one, and over a slot that no opener made, such
// as a recovery slot.
func ProveTryable(ctx context.Context, kek *seal.Secret, slots []seal.Slot, opener []seal.Wrapper) error {
	return prove(ctx, kek, slots, opener, untryable)
}

// untryable reports whether err says that a slot can't be tried here and now.
func untryable(err error) bool {
	return errors.Is(err, seal.ErrNotMine) || seal.CauseOf(err) == seal.CauseBootState
}

// Prove opens each slot and compares its KEK with kek, so that a slot that does not
// open is found before anyone relies on it. It fails for a slot that no opener made.
func Prove(ctx context.Context, kek *seal.Secret, slots []seal.Slot, opener []seal.Wrapper) error {
	return prove(ctx, kek, slots, opener, func(error) bool { return false })
}

// prove proves the slots, except those whose error passOver accepts.
func prove(ctx context.Context, kek *seal.Secret, slots []seal.Slot, opener []seal.Wrapper, passOver func(error) bool) error {
	for _, s := range slots {
		if err := proveAny(ctx, kek, s, opener); err != nil && !passOver(err) {
			return fmt.Errorf("the new %s slot does not open, nothing was changed: %w", s.Type, err)
		}
	}
	return nil
}

// proveAny proves s with the opener that made it. The error is seal.ErrNotMine if none
// did.
func proveAny(ctx context.Context, kek *seal.Secret, s seal.Slot, opener []seal.Wrapper) error {
	err := seal.ErrNotMine
	for _, w := range opener {
		if err = proveOne(ctx, kek, s, w); !errors.Is(err, seal.ErrNotMine) {
			return err
		}
	}
	return err
}

func proveOne(ctx context.Context, kek *seal.Secret, s seal.Slot, w seal.Wrapper) error {
	got, err := w.Unwrap(ctx, s)
	if err != nil {
		return err
	}
	defer got.Close()
	if !got.Equal(kek) {
		return seal.Errorf(seal.CauseSlotCorrupt, "see whether the wrapper's backend is healthy", "it holds another KEK")
	}
	return nil
}
