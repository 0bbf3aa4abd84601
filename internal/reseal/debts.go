package reseal

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// EarlierEpoch is the report of a command that has ended an epoch of this TPM.
const EarlierEpoch = "slots of the earlier epoch no longer open, kept copies included"

// ReportRevoked reports on the TPM slots that are in before but not in the open keyring.
// It returns revoked if the TPM that sealed them has raised its counter and confirmed it.
// Otherwise it says where copies of them still open. It is called after the change, and
// first tries to pay the debts of the open keyring.
func ReportRevoked(ctx context.Context, n *node.Node, before []seal.Slot, revoked string) []string {
	if err := PayDebts(ctx, n); err != nil {
		n.Log.Warn("kept copies of former slots still open", "cause", seal.CauseOf(err), "error", err)
	}
	after := n.OpenSlots()
	var changes []string
	if n.View.Revokes(before, after) {
		changes = append(changes, revoked)
	}
	known := n.View.Debts(before)
	for _, d := range n.View.Debts(after) {
		if !slices.ContainsFunc(known, func(k slotview.Debt) bool { return k.SameCounter(d.Copies) && k.AtMost == d.AtMost }) {
			changes = append(changes, "KEPT COPIES OF FORMER SLOTS "+d.Describe()+", which was not here to refuse them; "+d.Remedy())
		}
	}
	return changes
}

// PayDebts makes this machine's TPM refuse the copies that the open keyring lists as
// still open, and removes the refused ones from the keyring. The error is that of the
// last debt that may concern this TPM but could not be paid. Without a debt, or with
// debts only of another TPM, the keyring does not change.
func PayDebts(ctx context.Context, n *node.Node) error {
	var failure error
	var paid []slotview.Debt
	for _, d := range n.View.Debts(n.OpenSlots()) {
		switch err := n.Refuse(ctx, d.Copies); seal.CauseOf(err) {
		case seal.CauseTPMCleared: // the key that opened the copies is gone
			paid = append(paid, d)
		case seal.CauseOtherTPM:
		default:
			if err != nil {
				failure = err
				continue
			}
			paid = append(paid, d)
		}
	}
	if len(paid) == 0 {
		return failure
	}
	forgotten, err := Forget(ctx, n, func(d slotview.Debt) bool {
		return slices.ContainsFunc(paid, func(p slotview.Debt) bool { return p.SameCounter(d.Copies) && p.AtMost >= d.AtMost })
	})
	for _, d := range forgotten {
		n.Log.Info("kept copies of former slots no longer open", "ek", d.EK, "index", fmt.Sprintf("%#08x", d.Index), "upToEpoch", d.AtMost, "since", d.Since.Format(time.RFC3339))
	}
	return errors.Join(failure, err)
}

// Forget removes debts from the open keyring, and returns them.
func Forget(ctx context.Context, n *node.Node, which func(slotview.Debt) bool) (forgotten []slotview.Debt, err error) {
	err = n.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		var left []slotview.Debt
		for _, d := range n.View.Debts(k.Slots()) {
			if which(d) {
				forgotten = append(forgotten, d)
			} else {
				left = append(left, d)
			}
		}
		if len(forgotten) == 0 {
			return nil, errNothing
		}
		slots, err := n.View.WithDebts(k.Slots(), left)
		if err != nil {
			return nil, err
		}
		next, err := k.WithSlots(slots)
		return []*keyring.Keyring{next}, err
	})
	if errors.Is(err, errNothing) {
		err = nil
	}
	return forgotten, err
}
