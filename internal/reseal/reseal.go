package reseal

import (
	"context"
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Present seals the KEK to the present boot state, and revokes the slot of the earlier
// one.
func Present(ctx context.Context, n *node.Node, req admin.ResealRequest) (admin.KeyringState, error) {
	var bound []string
	var before, sealed []seal.Slot
	err := n.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		if !n.View.OpensWithTPM() {
			return nil, ErrNoTPM
		}
		if _, err := n.TPM.Epoch(ctx); err != nil && len(n.View.Demands(k.Slots())) == 0 {
			reason, _ := seal.SplitHint(err)
			return nil, fmt.Errorf("no slot of this node is sealed to a TPM, and %s; run kleidi reseal --new-tpm, which seals to the present TPM", reason)
		}
		present, err := n.Gate.State(ctx)
		if err != nil {
			return nil, err
		}
		kept := []tpm.Use{tpm.UseSigned, tpm.UseNext}
		if req.DropNext {
			kept = kept[:1]
		}
		live, err := n.LiveStates(ctx, k.Slots(), kept...)
		if err != nil {
			return nil, err
		}
		states := []tpm.BootState{present}
		for _, s := range live {
			states = append(states, refreshed(s, present))
		}
		v, err := n.Remote.DemandUnless(req.WithoutVerifier, k.ClusterID())
		if err != nil {
			return nil, err
		}
		if !req.BreakTwoOfTwo {
			if err := n.View.CheckSeal(k.Slots()); err != nil {
				return nil, err
			}
		}
		next, slots, err := replaceUnder(ctx, n, k, v, states)
		for _, s := range slots {
			bound = append(bound, "the KEK is sealed to "+n.View.OpensIn(s))
		}
		before, sealed = k.Slots(), slots
		bound = append(bound, n.View.ReportBroken(k.Slots())...)
		return []*keyring.Keyring{next}, err
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("reseal: %w", err)
	}
	if n.Unlocker.State().Fallback != nil {
		n.Unlocker.Nudge() // the TPM opens again; a reload notices that
	}
	bound = append(bound, ReportRevoked(ctx, n, before, EarlierEpoch)...)
	if allowsTooMuch(ctx, n, sealed) {
		bound = append(bound, "the boot policy still allows boots that are revoked on the TPM; run kleidi bootpolicy narrow")
	}
	return n.Unchanged(bound...)
}

// Next seals the KEK to the next boot state in the request, in addition to the present
// one. If there are already MaxNext of them, the oldest is dropped.
func Next(ctx context.Context, n *node.Node, req admin.ResealRequest) (admin.KeyringState, error) {
	b := *req.Next
	bank, err := keys.ParseBank(b.Bank)
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("reseal: %w", err)
	}
	state := tpm.BootState{PCR: authpolicy.PCR{Bank: bank, Values: b.PCRs}, Use: tpm.UseNext, Record: b.Record}
	var bound string
	var notes []string
	err = n.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		slots := k.Slots()
		live, err := n.Unrevoked(ctx, slots)
		if err != nil {
			return nil, err
		}
		for _, d := range n.View.Demands(live) {
			if (d.State.Use == tpm.UseNext || d.State.Use == tpm.UsePresent) && slotview.SameState(d.State, state) {
				return nil, errNothing
			}
		}
		oldest := n.View.OldestNext(slots)
		if !req.BreakTwoOfTwo {
			if err := n.View.CheckSeal(k.Slots()); err != nil {
				return nil, err
			}
		}
		next, slot, err := addBootState(ctx, n, k, state, oldest)
		if err != nil {
			return nil, err
		}
		bound, notes = n.View.OpensIn(slot), n.View.ReportBroken(slots)
		if oldest != nil {
			notes = append(notes, "the oldest slot for a next boot, made "+n.View.MadeAt(*oldest)+", was dropped: there are at most "+fmt.Sprint(slotview.MaxNext))
		}
		return []*keyring.Keyring{next}, nil
	})
	if errors.Is(err, errNothing) {
		return n.Unchanged("the KEK is sealed to that boot state already")
	}
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("reseal: %w", err)
	}
	return n.Unchanged(append([]string{"the KEK is sealed to " + bound + " as well", "once that boot has opened it, kleidi serve revokes the present one"}, notes...)...)
}
