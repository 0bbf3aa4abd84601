// Package rotation changes the KEK of a keyring, and the slots that hold it.
//
// It makes keyrings and saves none: a change that fails half-way has changed
// nothing.
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

// Rewrapper can wrap a KEK as an authenticated slot is
// wrapped: for the same boot state, key or recipients.
type Rewrapper interface {
	// WrapLike returns seal.ErrNotMine for a slot that another wrapper made.
	WrapLike(ctx context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error)
}

// Wrap makes the slots of a KEK.
type Wrap func(ctx context.Context, kek *seal.Secret) ([]seal.Slot, error)

// Like wraps a KEK once for each of slots, as that slot is wrapped. A slot that
// no wrapper can follow is an error: the new KEK must not have fewer ways in.
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

// SlotError says which slot could not be followed.
type SlotError struct {
	Slot seal.Slot
	Err  error
}

// Error implements error.
func (e *SlotError) Error() string {
	return fmt.Sprintf("wrap the new KEK as the %s slot is: %v", e.Slot.Type, e.Err)
}

// Unwrap returns why.
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

// Rotate returns the revisions of a rotation on one node, which are to be saved in this
// order: a fresh KEK is staged, then it is the current one, and the former one
// retired and still readable. With the first of these two kept as the previous revision,
// no single file is the only place of the fresh KEK. Each slot that can be opened
// here was opened. Where an earlier rotation was interrupted and left a KEK staged, a
// revision that retires it comes first.
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

// unstage ends a rotation that was interrupted. A staged KEK that does not open was
// sealed to a boot state that is gone, and no node has announced it.
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
	if err := prove(ctx, kek, slots, opener, true); err != nil {
		return nil, err
	}
	return k.Stage(kek, slots, now)
}

// Complete activates a staged KEK that a rotation left behind, where a wrapper
// opens it: something may have been encrypted under it, if a later revision is
// lost. It returns k itself where nothing is staged, and an error where what is
// staged does not open.
func Complete(ctx context.Context, k *keyring.Keyring, opener []seal.Wrapper, now time.Time) (*keyring.Keyring, error) {
	if id := k.StagedID(); id != "" && k.Holds(id) {
		return k.Activate(now)
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
			defer staged.Close()
			return staged.Activate(now)
		}
	}
	if refusal != nil {
		return nil, refusal
	}
	return k, nil
}

// ProveTryable is Prove for slots of which some may be for another boot state than
// the present one, or no opener's own: those are passed over.
func ProveTryable(ctx context.Context, kek *seal.Secret, slots []seal.Slot, opener []seal.Wrapper) error {
	return prove(ctx, kek, slots, opener, true)
}

// Prove opens each slot and compares what comes out: a slot that does not open
// must be found before it is relied on. A slot that is no opener's own has not
// been opened, and fails too.
func Prove(ctx context.Context, kek *seal.Secret, slots []seal.Slot, opener []seal.Wrapper) error {
	return prove(ctx, kek, slots, opener, false)
}

// prove can pass over what can't be tried: slots that are no opener's own, such as
// those for recovery, and slots for another boot state than the present one.
func prove(ctx context.Context, kek *seal.Secret, slots []seal.Slot, opener []seal.Wrapper, tryable bool) error {
	for _, s := range slots {
		err := proveAny(ctx, kek, s, opener)
		if tryable && (errors.Is(err, seal.ErrNotMine) || seal.CauseOf(err) == seal.CauseBootState) {
			continue
		}
		if err != nil {
			return fmt.Errorf("the new %s slot does not open, nothing was changed: %w", s.Type, err)
		}
	}
	return nil
}

// proveAny has the first opener whose own slot it is open it.
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
