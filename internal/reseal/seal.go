package reseal

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/tpm"
)

// sealStates seals kek to each of the boot states, and opens each new slot before
// anything relies on it. Slots for boots other than the running one can't be tried.
// opened reports whether any slot was opened.
func sealStates(ctx context.Context, n *node.Node, w *tpm.Wrapper, kek *seal.Secret, states []tpm.BootState) (slots []seal.Slot, opened bool, err error) {
	for _, s := range states {
		slot, err := SealState(ctx, n, w, kek, s)
		if err != nil {
			return nil, false, err
		}
		err = rotation.Prove(ctx, kek, []seal.Slot{slot}, n.Openers())
		opened = opened || err == nil
		literal := s.Use == tpm.UsePresent || s.Use == tpm.UseNext
		if err != nil && (seal.CauseOf(err) != seal.CauseBootState || literal && n.IsPresent(s)) {
			return nil, false, err
		}
		slots = append(slots, slot)
	}
	return slots, opened, nil
}

// ReplaceBootStates returns the revision in which the KEK is sealed to these boot
// states for the next epoch. Once that epoch has begun, no other slot of this node
// opens.
func ReplaceBootStates(ctx context.Context, n *node.Node, k *keyring.Keyring, states []tpm.BootState) (*keyring.Keyring, []seal.Slot, error) {
	if err := n.View.CheckSeal(k.Slots()); err != nil {
		return nil, nil, err
	}
	v, err := n.Remote.Demand(k.ClusterID())
	if err != nil {
		return nil, nil, err
	}
	return replaceUnder(ctx, n, k, v, states)
}

// replaceUnder returns the revision that ReplaceBootStates describes, with slots that
// need the agreement of this verifier (nil means none). The caller has checked that
// sealing to the TPM breaks no two-of-two.
func replaceUnder(ctx context.Context, n *node.Node, k *keyring.Keyring, v *tpm.Verifier, states []tpm.BootState) (*keyring.Keyring, []seal.Slot, error) {
	if err := n.CheckSecondKey(ctx, k); err != nil {
		return nil, nil, err
	}
	parts := slotview.TPMParts(k.Slots())
	w, err := n.TPM.With(tpm.SealOptions{NextEpoch: true, Revoke: parts, Verifier: v, SameTPMAs: parts})
	if err != nil {
		return nil, nil, err
	}
	slots, opened, err := sealStates(ctx, n, w, k.KEK(), states)
	if err != nil {
		return nil, nil, err
	}
	if !opened {
		return nil, nil, seal.Errorf(seal.CauseBootState, "run kleidi reseal first, which seals to the running boot", "no slot would be left that opens in the running boot, nothing was changed")
	}
	others := slices.DeleteFunc(k.Slots(), func(s seal.Slot) bool {
		return n.View.OfThisTPM(s) || (slotview.TypeOf(s) == seal.TypeTPM || slotview.Second(slotview.TypeOf(s)) != "") && s.Node == n.Config.Node
	})
	all, err := n.View.Owing(k.Slots(), append(slots, others...))
	if err != nil {
		return nil, nil, err
	}
	next, err := k.WithSlots(all)
	return next, slots, err
}

// addBootState returns the revision in which the KEK is sealed to one more boot state.
// It revokes nothing, but removes the slot in drop from the keyring, unless drop is
// nil. The caller has checked that sealing to the TPM breaks no two-of-two.
func addBootState(ctx context.Context, n *node.Node, k *keyring.Keyring, state tpm.BootState, drop *seal.Slot) (*keyring.Keyring, seal.Slot, error) {
	v, err := n.Remote.Demand(k.ClusterID())
	if err != nil {
		return nil, seal.Slot{}, err
	}
	if err := n.CheckSecondKey(ctx, k); err != nil {
		return nil, seal.Slot{}, err
	}
	w, err := n.TPM.With(tpm.SealOptions{Verifier: v, SameTPMAs: slotview.TPMParts(k.Slots())})
	if err != nil {
		return nil, seal.Slot{}, err
	}
	slots, _, err := sealStates(ctx, n, w, k.KEK(), []tpm.BootState{state})
	if err != nil {
		return nil, seal.Slot{}, err
	}
	kept := slices.DeleteFunc(k.Slots(), func(s seal.Slot) bool { return drop != nil && bytes.Equal(s.Data, drop.Data) })
	next, err := k.WithSlots(append(kept, slots...))
	return next, slots[0], err
}

// refreshed returns a signed boot state with the PCR values of the present one.
func refreshed(s, present tpm.BootState) tpm.BootState {
	if s.Use != tpm.UseSigned || s.Bank != present.Bank {
		return s
	}
	s.Values = maps.Clone(s.Values)
	for i := range s.Values {
		if v := present.Values[i]; v != nil {
			s.Values[i] = v
		}
	}
	return s
}

var errNothing = errors.New("nothing to do")

// ErrNoTPM is the refusal to seal to a TPM that may not open the keyring.
var ErrNoTPM = errors.New("unlock.order names no TPM; add tpm to it, and restart kleidi serve")

// SealPresent seals kek to the present boot state, and opens the new slot before
// anything relies on it.
func SealPresent(ctx context.Context, n *node.Node, w *tpm.Wrapper, kek *seal.Secret) (seal.Slot, error) {
	state, err := n.Gate.State(ctx)
	if err != nil {
		return seal.Slot{}, err
	}
	slot, err := SealState(ctx, n, w, kek, state)
	if err != nil {
		return slot, err
	}
	return slot, rotation.Prove(ctx, kek, []seal.Slot{slot}, n.Openers())
}

// SealState seals a KEK to a boot state, alone or together with the second wrapper.
func SealState(ctx context.Context, n *node.Node, w *tpm.Wrapper, kek *seal.Secret, state tpm.BootState) (seal.Slot, error) {
	kind := n.View.TwoOfTwo()
	if kind == "" {
		return w.WrapState(ctx, kek, state)
	}
	pair := n.TwoOfTwoWrapper(kind, w)
	return pair.WrapWith(ctx, kek,
		func(ctx context.Context, share *seal.Secret) (seal.Slot, error) {
			return w.WrapState(ctx, share, state)
		}, pair.Second.Wrap)
}
