package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// resealToNewTPM does what recover does, without the recovery identity, while the
// keyring is open by other means than the TPM: by a fallback, or since the TPM was
// cleared under a running serve. That TPM is trusted as it is, as at init.
func (n *node) resealToNewTPM(ctx context.Context, req admin.ResealRequest) (admin.KeyringState, error) {
	var former seal.KeyID
	var changes []string
	err := n.unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		if err := n.isNew(ctx, k.Slots()); err != nil {
			return nil, err
		}
		if !req.BreakTwoOfTwo {
			if err := n.keepsBoth(k.Slots()); err != nil {
				return nil, err
			}
		}
		if err := n.sameKey(ctx, k); err != nil {
			return nil, err
		}
		former, changes = k.CurrentID(), append(n.renewed(k), n.broken(k.Slots())...)
		revisions, err := n.renew(ctx, k, req.WithoutVerifier, n.strangers(ctx, k))
		if err != nil {
			return nil, err
		}
		last := revisions[len(revisions)-1]
		if last.CurrentID() == former {
			changes[0] = "the KEK that it had is sealed to this machine's present boot state: the keyring has no room for another retired one"
		}
		changes = slices.Concat(changes, n.leftOut(last.Slots()), dropped(k.Slots(), last.Slots()))
		return revisions, nil
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("reseal --new-tpm: %w", err)
	}
	if n.unlocker.State().Fallback != nil {
		n.unlocker.Nudge() // the TPM opens, which a reload finds out
	}
	return n.result(former, changes...)
}

var errNoTPM = errors.New("unlock.order names no TPM; add tpm to it, and restart kleidi serve")

// isNew reports whether no slot of this node is sealed to this machine's TPM.
func (n *node) isNew(ctx context.Context, slots []seal.Slot) error {
	if !n.opensWithTPM() {
		return errNoTPM
	}
	w, err := n.tpm.OnTPMOf(halves(slots))
	if err != nil {
		return err
	}
	if len(n.demands(slots)) == 0 {
		return nil
	}
	_, err = w.Epoch(ctx)
	switch seal.CauseOf(err) {
	case seal.CauseOtherTPM, seal.CauseTPMCleared:
		return nil
	case "":
		return errors.New("the slots are sealed to this TPM; run kleidi reseal without --new-tpm")
	}
	return err
}
