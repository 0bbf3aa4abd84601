package recovery

import (
	"context"

	"github.com/beezy-dev/kleidi/seal"
)

// Rewrapper wraps further KEKs to the recipients of slots that it is shown.
type Rewrapper struct{ Memory seal.Memory }

// WrapLike wraps kek to the recipients that a slot of an open keyring names. A
// slot of another type is [seal.ErrNotMine].
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
