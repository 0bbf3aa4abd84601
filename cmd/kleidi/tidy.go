package main

import (
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
)

// tidy takes away what has had its day, once the machine runs in a boot state that
// a slot names whole: the boot states before it, after an update, and a
// suspension that is used up.
func (n *node) tidy(ctx context.Context) error {
	var bound string
	err := n.unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		states, err := n.tidied(ctx, k.Slots())
		if err != nil {
			return nil, err
		}
		next, slots, err := n.reshape(ctx, k, states)
		if err != nil {
			return nil, err
		}
		bound = n.what(slots[0])
		return []*keyring.Keyring{next}, nil
	})
	if errors.Is(err, errNothing) {
		return nil
	}
	if err == nil {
		n.log.Info("this boot has opened the keyring: earlier boot states and suspensions are revoked", "slot", bound)
	}
	return err
}

// tidied returns the boot states that stay, that of the running boot first where a
// slot names it: after an update those that were prepared later, what is signed,
// and a suspension that is not used up. What is revoked counts for nothing: a
// keyring of before may have been put back.
func (n *node) tidied(ctx context.Context, slots []seal.Slot) ([]tpm.BootState, error) {
	if at, d := n.running(slots); (at < 0 || d.State.Use != tpm.UseNext) && !slices.ContainsFunc(slots, n.suspends) {
		return nil, errNothing
	}
	slots, err := n.unrevoked(ctx, slots)
	if err != nil {
		return nil, err
	}
	spent, err := n.spent(ctx, slots)
	if err != nil {
		return nil, err
	}
	at, running := n.running(slots)
	updated := at >= 0 && running.State.Use == tpm.UseNext
	if !updated && len(spent) == 0 {
		return nil, errNothing
	}
	var states []tpm.BootState
	if at >= 0 {
		running.State.Use = tpm.UsePresent
		states = append(states, running.State)
	}
	demands := n.demands(slots)
	for _, i := range slices.Sorted(maps.Keys(demands)) {
		s := demands[i].State
		literal := s.Use == tpm.UsePresent || s.Use == tpm.UseNext
		again := literal && n.present(s)
		before := updated && (s.Use == tpm.UsePresent || s.Use == tpm.UseNext && i < at)
		if !spent[i] && !again && !before {
			states = append(states, refreshed(s, running.State))
		}
	}
	return states, nil
}

// running returns the place of the slot that names the running boot whole, and
// what it demands; -1 where there is none.
func (n *node) running(slots []seal.Slot) (int, tpm.Demand) {
	demands := n.demands(slots)
	for _, i := range slices.Sorted(maps.Keys(demands)) {
		d := demands[i]
		if (d.State.Use == tpm.UsePresent || d.State.Use == tpm.UseNext) && n.present(d.State) {
			return i, d
		}
	}
	return -1, tpm.Demand{}
}

// spent returns the places of the suspensions that are used up.
func (n *node) spent(ctx context.Context, slots []seal.Slot) (map[int]bool, error) {
	spent := map[int]bool{}
	for i, d := range n.demands(slots) {
		if d.State.Use != tpm.UseSuspend {
			continue
		}
		count, err := n.gate.Device.ResetCount(ctx, n.gate.Owner)
		if err != nil {
			return nil, err
		}
		if count > d.State.Resets {
			spent[i] = true
		}
	}
	return spent, nil
}
