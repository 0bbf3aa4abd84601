package lifecycle

import (
	"context"

	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

// wrapSecondary wraps a KEK with the token or the server.
func wrapSecondary(ctx context.Context, n *node.Node, kind string, kek *seal.Secret) (seal.Slot, error) {
	w := n.Wrapper(kind)
	if w == nil {
		return seal.Slot{}, seal.Errorf(seal.CauseNoSlot, "configure "+kind+", and run kleidi slot add "+kind, "%s is not configured on this node", kind)
	}
	slot, err := w.Wrap(ctx, kek)
	if err == nil {
		err = rotation.Prove(ctx, kek, []seal.Slot{slot}, []seal.Wrapper{w})
	}
	return slot, err
}

// replacedSlots returns the slots of the replaced keyring: the open one, or else the
// stored one, which nothing authenticates. The slots are only compared. It returns none
// if that keyring is lost.
func replacedSlots(ctx context.Context, n *node.Node) []seal.Slot {
	if k, err := n.Unlocker.Keyring(); err == nil {
		return k.Slots()
	}
	u, _, err := n.Stored(ctx)
	if err != nil {
		return nil
	}
	return u.Slots()
}
