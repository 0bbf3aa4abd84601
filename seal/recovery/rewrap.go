package recovery

import (
	"context"

	"github.com/beezy-dev/kleidi/seal"
)

// Rewrapper wraps a KEK to the recipients of another slot.
type Rewrapper struct{ Memory seal.Memory }

// WrapLike wraps kek to the recipients of like, which must be a slot of an open keyring.
// The error is [seal.ErrNotMine] if like has another type.
func (r Rewrapper) WrapLike(ctx context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error) {
	recipients, err := Recipients(like)
	if err != nil {
		return seal.Slot{}, err
	}
	w, err := NewWrapper(r.Memory, recipients)
	if err != nil {
		return seal.Slot{}, err
	}
	return w.Wrap(ctx, kek)
}
