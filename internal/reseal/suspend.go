package reseal

import (
	"context"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Suspend seals the KEK to a part of the present boot state, for a few boots that the
// TPM counts.
func Suspend(ctx context.Context, n *node.Node, req admin.SuspendRequest) (admin.KeyringState, error) {
	if req.Boots < 1 || req.Boots > maxBoots {
		return admin.KeyringState{}, fmt.Errorf("suspend: %d boots; want 1 to %d", req.Boots, maxBoots)
	}
	var bound string
	err := n.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		state, err := n.Gate.Suspended(ctx, req.Weaken)
		if err != nil {
			return nil, err
		}
		resets, err := keys.ResetCount(ctx, n.Gate.Device, n.Gate.Owner)
		if err != nil {
			return nil, err
		}
		state.Resets = resets + uint32(req.Boots)
		if err := anchorHolds(n, state); err != nil {
			return nil, err
		}
		next, slot, err := addSuspension(ctx, n, k, state)
		if err != nil {
			return nil, err
		}
		bound = n.View.OpensIn(slot)
		return []*keyring.Keyring{next}, nil
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("suspend: %w", err)
	}
	return n.Unchanged("SUSPENDED: the KEK is sealed to "+bound, "anyone who boots this machine in that way gets it; when the work is done, run kleidi reseal, which ends this")
}

// addSuspension also seals the KEK to a suspension. It revokes an earlier
// suspension, which may be the weaker one.
func addSuspension(ctx context.Context, n *node.Node, k *keyring.Keyring, state tpm.BootState) (*keyring.Keyring, seal.Slot, error) {
	if !slices.ContainsFunc(k.Slots(), n.View.Suspends) {
		if err := n.View.CheckSeal(k.Slots()); err != nil {
			return nil, seal.Slot{}, err
		}
		return addBootState(ctx, n, k, state, nil)
	}
	states, err := n.LiveStates(ctx, k.Slots(), tpm.UsePresent, tpm.UseNext, tpm.UseSigned)
	if err != nil {
		return nil, seal.Slot{}, err
	}
	next, slots, err := ReplaceBootStates(ctx, n, k, append(states, state))
	if err != nil {
		return nil, seal.Slot{}, err
	}
	return next, slots[len(slots)-1], nil
}

// maxBoots bounds a suspension. A firmware update takes two or three boots.
const maxBoots = 16

// anchorHolds refuses a slot for boots in which the anchor in the TPM could not be read.
func anchorHolds(n *node.Node, s tpm.BootState) error {
	if n.Config.Anchor.Store != config.AnchorTPM {
		return nil
	}
	for _, i := range n.Config.Anchor.PCRs {
		if s.Values[i] == nil {
			return fmt.Errorf("the anchor in the TPM is bound to PCR %d, which this slot would leave out: a boot that changes this PCR would still need kleidi recover --trust-key-id KEY_ID with the recovery identity; see docs/threat-model.md", i)
		}
	}
	return nil
}

// spent returns the indexes of the suspensions that are used up.
func spent(ctx context.Context, n *node.Node, slots []seal.Slot) (map[int]bool, error) {
	spent := map[int]bool{}
	for i, d := range n.View.Demands(slots) {
		if d.State.Use != tpm.UseSuspend {
			continue
		}
		count, err := keys.ResetCount(ctx, n.Gate.Device, n.Gate.Owner)
		if err != nil {
			return nil, err
		}
		if count > d.State.Resets {
			spent[i] = true
		}
	}
	return spent, nil
}
