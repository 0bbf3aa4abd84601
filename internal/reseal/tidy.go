package reseal

import (
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
)

// Tidy removes outdated slots once the machine runs in a boot state that a slot names
// completely: the earlier boot states after an update, and a suspension that is used
// up.
func Tidy(ctx context.Context, n *node.Node) error {
	var bound string
	var sealed []seal.Slot
	err := n.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		states, err := tidied(ctx, n, k.Slots())
		if err != nil {
			return nil, err
		}
		next, slots, err := ReplaceBootStates(ctx, n, k, states)
		if err != nil {
			return nil, err
		}
		bound, sealed = n.View.OpensIn(slots[0]), slots
		return []*keyring.Keyring{next}, nil
	})
	if errors.Is(err, errNothing) {
		return nil
	}
	if err == nil {
		n.Log.Info("this boot has opened the keyring: earlier boot states and suspensions are revoked", "slot", bound)
		if allowsTooMuch(ctx, n, sealed) {
			n.Log.Warn("the boot policy still allows boots that are revoked on the TPM; run kleidi bootpolicy narrow")
		}
	}
	return err
}

// tidied returns the boot states that stay, with the running boot first if a slot names
// it: after an update, the boots prepared later, the signed boot states, and a
// suspension that is not used up. Revoked slots do not count, because somebody may have
// restored an earlier keyring.
func tidied(ctx context.Context, n *node.Node, slots []seal.Slot) ([]tpm.BootState, error) {
	if at, d := n.RunningSlot(slots); (at < 0 || d.State.Use != tpm.UseNext) && !slices.ContainsFunc(slots, n.View.Suspends) {
		return nil, errNothing
	}
	slots, err := n.Unrevoked(ctx, slots)
	if err != nil {
		return nil, err
	}
	spent, err := spent(ctx, n, slots)
	if err != nil {
		return nil, err
	}
	at, running := n.RunningSlot(slots)
	updated := at >= 0 && running.State.Use == tpm.UseNext
	if !updated && len(spent) == 0 {
		return nil, errNothing
	}
	var states []tpm.BootState
	if at >= 0 {
		running.State.Use = tpm.UsePresent
		states = append(states, running.State)
	}
	demands := n.View.Demands(slots)
	for _, i := range slices.Sorted(maps.Keys(demands)) {
		s := demands[i].State
		literal := s.Use == tpm.UsePresent || s.Use == tpm.UseNext
		again := literal && n.IsPresent(s)
		before := updated && (s.Use == tpm.UsePresent || s.Use == tpm.UseNext && i < at)
		if !spent[i] && !again && !before {
			states = append(states, refreshed(s, running.State))
		}
	}
	return states, nil
}
