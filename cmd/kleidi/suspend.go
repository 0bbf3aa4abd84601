package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
)

// A suspension: other boots may open the keyring for a while, before work that can't be
// predicted.

// maxBoots bounds a suspension. A firmware update takes two boots or three.
const maxBoots = 16

// suspend seals the KEK to a part of the present boot state, for a few boots that
// the TPM counts.
func (n *node) suspend(ctx context.Context, req admin.SuspendRequest) (admin.KeyringState, error) {
	if req.Boots < 1 || req.Boots > maxBoots {
		return admin.KeyringState{}, fmt.Errorf("suspend: %d boots; want 1 to %d", req.Boots, maxBoots)
	}
	var bound string
	err := n.unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		state, err := n.gate.Suspended(ctx, req.Weaken)
		if err != nil {
			return nil, err
		}
		resets, err := n.gate.Device.ResetCount(ctx, n.gate.Owner)
		if err != nil {
			return nil, err
		}
		state.Resets = resets + uint32(req.Boots)
		if err := n.anchorHolds(state); err != nil {
			return nil, err
		}
		next, slot, err := n.addSuspension(ctx, k, state)
		if err != nil {
			return nil, err
		}
		bound = n.what(slot)
		return []*keyring.Keyring{next}, nil
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("suspend: %w", err)
	}
	return n.unchanged("SUSPENDED: the KEK is sealed to "+bound, "anyone who boots this machine so gets it; when the work is done, run kleidi reseal, which ends this")
}

// addSuspension seals to a suspension besides. One that is there already is revoked:
// it may be the weaker one.
func (n *node) addSuspension(ctx context.Context, k *keyring.Keyring, state tpm.BootState) (*keyring.Keyring, seal.Slot, error) {
	if !slices.ContainsFunc(k.Slots(), n.suspends) {
		return n.extend(ctx, k, state, nil, false)
	}
	states, err := n.live(ctx, k.Slots(), tpm.UsePresent, tpm.UseNext, tpm.UseSigned)
	if err != nil {
		return nil, seal.Slot{}, err
	}
	next, slots, err := n.reshape(ctx, k, append(states, state))
	if err != nil {
		return nil, seal.Slot{}, err
	}
	return next, slots[len(slots)-1], nil
}

// anchorHolds refuses a slot for boots in which the anchor in the TPM could not be read.
func (n *node) anchorHolds(s tpm.BootState) error {
	if n.cfg.Anchor.Store != config.AnchorTPM {
		return nil
	}
	for _, i := range n.cfg.Anchor.PCRs {
		if s.Values[i] == nil {
			return fmt.Errorf("the anchor in the TPM is bound to PCR %d, which this slot would let go: a boot that changes it needs kleidi recover with the recovery identity all the same; see docs/threat-model.md", i)
		}
	}
	return nil
}

// suspends reports whether a slot is this node's for a suspension.
func (n *node) suspends(s seal.Slot) bool {
	return len(n.states([]seal.Slot{s}, tpm.UseSuspend)) > 0
}
