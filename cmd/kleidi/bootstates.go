package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
)

// The slots of this node: one for the present boot state, and those that keep an
// update from locking the node out.

// demands returns what the TPM slots of this node ask of the machine, each with
// its place among slots.
func (n *node) demands(slots []seal.Slot) map[int]tpm.Demand {
	all := map[int]tpm.Demand{}
	for i, s := range slots {
		if !n.isTPM(s) {
			continue
		}
		if d, err := tpm.DemandOf(ofTPM(s), n.gate.Counter); err == nil {
			all[i] = d
		}
	}
	return all
}

// states returns the boot states of the slots of this node that are for these uses.
func (n *node) states(slots []seal.Slot, uses ...tpm.Use) []tpm.BootState {
	var states []tpm.BootState
	demands := n.demands(slots)
	for _, i := range slices.Sorted(maps.Keys(demands)) {
		if s := demands[i].State; slices.Contains(uses, s.Use) {
			states = append(states, s)
		}
	}
	return states
}

// live is states without those that are revoked.
func (n *node) live(ctx context.Context, slots []seal.Slot, uses ...tpm.Use) ([]tpm.BootState, error) {
	slots, err := n.unrevoked(ctx, slots)
	return n.states(slots, uses...), err
}

// revoked reports whether the epoch of a slot of this TPM has passed.
func (n *node) revoked(s seal.Slot, epoch uint64) bool {
	d, ok := n.demands([]seal.Slot{s})[0]
	return ok && d.AtMost < epoch
}

// reshape returns the revision in which the KEK is sealed to these boot states,
// for the next epoch: once that has begun, no other slot of this node opens.
func (n *node) reshape(ctx context.Context, k *keyring.Keyring, states []tpm.BootState) (*keyring.Keyring, []seal.Slot, error) {
	v, err := n.remote.demand(k.ClusterID(), false)
	if err != nil {
		return nil, nil, err
	}
	return n.reshapeUnder(ctx, k, v, states, false)
}

// reshapeUnder does so under this verifier, or none; breaks allows the TPM alone in
// the place of a two-of-two.
func (n *node) reshapeUnder(ctx context.Context, k *keyring.Keyring, v *tpm.Verifier, states []tpm.BootState, breaks bool) (*keyring.Keyring, []seal.Slot, error) {
	if !breaks {
		if err := n.sealsAlone(k.Slots()); err != nil {
			return nil, nil, err
		}
	}
	if err := n.sameKey(ctx, k); err != nil {
		return nil, nil, err
	}
	w, err := n.tpm.ForNextEpoch(halves(k.Slots())).Demanding(v).OnTPMOf(halves(k.Slots()))
	if err != nil {
		return nil, nil, err
	}
	slots, opened, err := n.sealTo(ctx, w, k.KEK(), states)
	if err != nil {
		return nil, nil, err
	}
	if !opened {
		return nil, nil, seal.Errorf(seal.CauseBootState, "run kleidi reseal first, which seals to the running boot", "no slot would be left that opens in the running boot, nothing was changed")
	}
	others := slices.DeleteFunc(k.Slots(), func(s seal.Slot) bool {
		return n.isTPM(s) || (typeName(s) == seal.TypeTPM || twoOfTwo(typeName(s)) != "") && s.Node == n.cfg.Node
	})
	next, err := k.WithSlots(append(slots, others...))
	return next, slots, err
}

// extend returns the revision in which the KEK is sealed to one boot state more.
// Nothing is revoked; drop, if there is one, leaves the keyring all the same; breaks
// allows the TPM alone beside a two-of-two.
func (n *node) extend(ctx context.Context, k *keyring.Keyring, state tpm.BootState, drop *seal.Slot, breaks bool) (*keyring.Keyring, seal.Slot, error) {
	if !breaks {
		if err := n.sealsAlone(k.Slots()); err != nil {
			return nil, seal.Slot{}, err
		}
	}
	v, err := n.remote.demand(k.ClusterID(), false)
	if err != nil {
		return nil, seal.Slot{}, err
	}
	if err := n.sameKey(ctx, k); err != nil {
		return nil, seal.Slot{}, err
	}
	w, err := n.tpm.Demanding(v).OnTPMOf(halves(k.Slots()))
	if err != nil {
		return nil, seal.Slot{}, err
	}
	slots, _, err := n.sealTo(ctx, w, k.KEK(), []tpm.BootState{state})
	if err != nil {
		return nil, seal.Slot{}, err
	}
	kept := slices.DeleteFunc(k.Slots(), func(s seal.Slot) bool { return drop != nil && bytes.Equal(s.Data, drop.Data) })
	next, err := k.WithSlots(append(kept, slots...))
	return next, slots[0], err
}

// sealTo seals kek to each of the boot states, and opens what it made before
// anything relies on it. Slots for other boots than the running one can't be
// tried; opened says whether any could.
func (n *node) sealTo(ctx context.Context, w *tpm.Wrapper, kek *seal.Secret, states []tpm.BootState) (slots []seal.Slot, opened bool, err error) {
	for _, s := range states {
		slot, err := n.wrapState(ctx, w, kek, s)
		if err != nil {
			return nil, false, err
		}
		err = rotation.Prove(ctx, kek, []seal.Slot{slot}, n.openers())
		opened = opened || err == nil
		literal := s.Use == tpm.UsePresent || s.Use == tpm.UseNext
		if err != nil && (seal.CauseOf(err) != seal.CauseBootState || literal && n.present(s)) {
			return nil, false, err
		}
		slots = append(slots, slot)
	}
	return slots, opened, nil
}

// anyReseal is the reseal that a request asks for.
func (n *node) anyReseal(ctx context.Context, req admin.ResealRequest) (admin.KeyringState, error) {
	switch {
	case req.Next != nil:
		return n.resealNext(ctx, *req.Next, req.BreakTwoOfTwo)
	case req.NewTPM:
		return n.resealToNewTPM(ctx, req)
	default:
		return n.reseal(ctx, req)
	}
}

// reseal seals the KEK to the present boot state, and revokes the slot of the
// earlier one.
func (n *node) reseal(ctx context.Context, req admin.ResealRequest) (admin.KeyringState, error) {
	var bound []string
	err := n.unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		if !n.opensWithTPM() {
			return nil, errNoTPM
		}
		if _, err := n.tpm.Epoch(ctx); err != nil && len(n.demands(k.Slots())) == 0 {
			reason, _ := seal.SplitHint(err)
			return nil, fmt.Errorf("no slot of this node is sealed to a TPM, and %s; run kleidi reseal --new-tpm, which seals to the TPM that is there", reason)
		}
		present, err := n.gate.State(ctx)
		if err != nil {
			return nil, err
		}
		kept := []tpm.Use{tpm.UseSigned, tpm.UseNext}
		if req.DropNext {
			kept = kept[:1]
		}
		live, err := n.live(ctx, k.Slots(), kept...)
		if err != nil {
			return nil, err
		}
		states := []tpm.BootState{present}
		for _, s := range live {
			states = append(states, refreshed(s, present))
		}
		v, err := n.remote.demand(k.ClusterID(), req.WithoutVerifier)
		if err != nil {
			return nil, err
		}
		next, slots, err := n.reshapeUnder(ctx, k, v, states, req.BreakTwoOfTwo)
		for _, s := range slots {
			bound = append(bound, "the KEK is sealed to "+n.what(s))
		}
		bound = append(bound, n.broken(k.Slots())...)
		return []*keyring.Keyring{next}, err
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("reseal: %w", err)
	}
	if n.unlocker.State().Fallback != nil {
		n.unlocker.Nudge() // the TPM opens again, which a reload finds out
	}
	return n.unchanged(append(bound, "slots of the earlier epoch no longer open, kept copies included")...)
}

// refreshed is a signed boot state with the PCR values of the present one.
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

// unchanged is the result of an operation that kept the current KEK.
func (n *node) unchanged(changes ...string) (admin.KeyringState, error) {
	k, err := n.unlocker.CurrentID()
	if err != nil {
		return admin.KeyringState{}, err
	}
	return n.result(k, changes...)
}

// maxNext bounds the slots for next boots: an update may build its files several
// times. The oldest goes, and is revoked with the epoch.
const maxNext = 4

var errNothing = errors.New("nothing to do")

func (n *node) resealNext(ctx context.Context, b admin.BootState, breaks bool) (admin.KeyringState, error) {
	bank, err := tpm.ParseBank(b.Bank)
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("reseal: %w", err)
	}
	state := tpm.BootState{PCR: authpolicy.PCR{Bank: bank, Values: b.PCRs}, Use: tpm.UseNext, Record: b.Record}
	var bound string
	var notes []string
	err = n.unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		slots := k.Slots()
		live, err := n.unrevoked(ctx, slots)
		if err != nil {
			return nil, err
		}
		for _, d := range n.demands(live) {
			if (d.State.Use == tpm.UseNext || d.State.Use == tpm.UsePresent) && same(d.State, state) {
				return nil, errNothing
			}
		}
		oldest := n.oldestNext(slots)
		next, slot, err := n.extend(ctx, k, state, oldest, breaks)
		if err != nil {
			return nil, err
		}
		bound, notes = n.what(slot), n.broken(slots)
		if oldest != nil {
			notes = append(notes, "the oldest slot for a next boot, made "+n.made(*oldest)+", had to go: there are at most "+fmt.Sprint(maxNext))
		}
		return []*keyring.Keyring{next}, nil
	})
	if errors.Is(err, errNothing) {
		return n.unchanged("the KEK is sealed to that boot state already")
	}
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("reseal: %w", err)
	}
	return n.unchanged(append([]string{"the KEK is sealed to " + bound + " as well", "once that boot has opened it, kleidi serve revokes the present one"}, notes...)...)
}

// made says when a slot of this TPM was made.
func (n *node) made(s seal.Slot) string {
	return n.demands([]seal.Slot{s})[0].Made.Local().Format(time.DateTime)
}

// oldestNext returns the oldest slot for a next boot, where there are as many as
// there may be. Of slots made in the same second, later ones stand behind.
func (n *node) oldestNext(slots []seal.Slot) *seal.Slot {
	var next []int
	demands := n.demands(slots)
	for _, i := range slices.Sorted(maps.Keys(demands)) {
		if demands[i].State.Use == tpm.UseNext {
			next = append(next, i)
		}
	}
	if len(next) < maxNext {
		return nil
	}
	slices.SortStableFunc(next, func(a, b int) int { return demands[a].Made.Compare(demands[b].Made) })
	return &slots[next[0]]
}

// same reports whether two boot states are of the same PCR values.
func same(a, b tpm.BootState) bool {
	return a.Bank == b.Bank && maps.EqualFunc(a.Values, b.Values, bytes.Equal)
}

// present reports whether the machine was last attested in this boot state.
func (n *node) present(s tpm.BootState) bool {
	last := n.gate.Last()
	if last == nil || last.Bank != s.Bank {
		return false
	}
	for i, v := range s.Values {
		if !bytes.Equal(last.PCRs[i], v) {
			return false
		}
	}
	return true
}
