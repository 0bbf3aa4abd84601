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

// EarlierEpoch is what a command says that has ended an epoch of this TPM.
const EarlierEpoch = "slots of the earlier epoch no longer open, kept copies included"

// ReportRevoked says what became of the slots of a TPM that before has and the open keyring
// has not: revoked, in these words, if the TPM that sealed them has raised its counter and
// said so, else where copies of them still open. It is called after the change: what the
// open keyring owes is tried first.
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

// PayDebts has this machine's TPM refuse the copies that the open keyring names as still
// open, and takes those out of it that it now refuses. The error is that of the last one
// that it could not be told to refuse though it may be its own. Without a debt, or with
// those of another TPM alone, the keyring stays as it is.
func PayDebts(ctx context.Context, n *node.Node) error {
	var failure error
	var paid []slotview.Debt
	for _, d := range n.View.Debts(n.OpenSlots()) {
		switch err := n.Refuse(ctx, d.Copies); seal.CauseOf(err) {
		case seal.CauseTPMCleared: // the key that opened them is gone
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

// Forget takes debts out of the open keyring, and returns them.
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
