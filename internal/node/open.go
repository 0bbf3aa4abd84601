package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
)

// IsPresent reports whether the machine was last attested in this boot state.
func (n *Node) IsPresent(s tpm.BootState) bool {
	last := n.Gate.Last()
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

// LiveStates returns the boot states for these uses, without the revoked ones.
func (n *Node) LiveStates(ctx context.Context, slots []seal.Slot, uses ...tpm.Use) ([]tpm.BootState, error) {
	slots, err := n.Unrevoked(ctx, slots)
	return n.View.BootStates(slots, uses...), err
}

// Unchanged is the result of an operation that kept the current KEK.
func (n *Node) Unchanged(changes ...string) (admin.KeyringState, error) {
	k, err := n.Unlocker.CurrentID()
	if err != nil {
		return admin.KeyringState{}, err
	}
	return n.Result(k, changes...)
}

// Result is the result of an operation: the open keyring's state, and former if another KEK
// is current now.
func (n *Node) Result(former seal.KeyID, changes ...string) (admin.KeyringState, error) {
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return admin.KeyringState{}, err
	}
	s := admin.KeyringState{CurrentKeyID: k.CurrentID(), Revision: k.Revision(), Changes: changes}
	if former != s.CurrentKeyID {
		s.Former = former
	}
	return s, nil
}

// TryOpen lets the slot's wrapper open it, compares the key ID, and forgets the KEK.
func (n *Node) TryOpen(ctx context.Context, s seal.Slot, id seal.KeyID, cluster seal.ClusterID) error {
	w := n.Wrapper(s.Type)
	if w == nil {
		return seal.Errorf(seal.CauseNoSlot, "configure its wrapper; kleidi recover opens a recovery slot", "nothing here can open it")
	}
	kek, err := w.Unwrap(ctx, s)
	if errors.Is(err, seal.ErrNotMine) {
		return seal.Errorf(seal.CauseNoSlot, "see node and the wrapper's settings in the configuration", "the slot is for another node, token or key than the configured one")
	}
	if err != nil {
		return err
	}
	defer kek.Close()
	if got := keyring.NewKeyID(cluster, kek); got != id {
		return seal.Errorf(seal.CauseSlotCorrupt, "run kleidi slot rewrap NAME, or kleidi keyring restore --previous", "it holds the KEK of key ID %s", got).OrRecover()
	}
	return nil
}

// TryOpenOrMissing opens one of slots, or says why the slot is missing.
func (n *Node) TryOpenOrMissing(ctx context.Context, slots []seal.Slot, s seal.Slot, id seal.KeyID, cluster seal.ClusterID) error {
	if d, ok := slotview.MissingOf(s); ok {
		return n.View.WhyMissing(d, slots)
	}
	return n.TryOpen(ctx, s, id, cluster)
}

// Unrevoked leaves out the slots of this TPM whose epoch has passed: they must not come
// back.
func (n *Node) Unrevoked(ctx context.Context, slots []seal.Slot) ([]seal.Slot, error) {
	if len(n.View.Demands(slots)) == 0 {
		return slots, nil
	}
	w, err := n.TPM.With(tpm.SealOptions{SameTPMAs: slotview.TPMParts(slots)})
	if err != nil {
		return nil, err
	}
	epoch, err := w.Epoch(ctx)
	return slices.DeleteFunc(slices.Clone(slots), func(s seal.Slot) bool { return n.View.Revoked(s, epoch) }), err
}

// CanOpen reports whether one of the slots belongs to a wrapper that may open the
// keyring on this node. A slot of the TPM must be for the running boot, or for signed
// boot states.
func (n *Node) CanOpen(slots []seal.Slot) bool {
	at, _ := n.RunningSlot(slots)
	return at >= 0 && n.View.OpensWithTPM() || len(n.View.BootStates(slots, tpm.UseSigned)) > 0 || slices.ContainsFunc(slots, func(s seal.Slot) bool {
		return slices.Contains(n.Config.Unlock.Order, s.Type) && !n.View.OfThisTPM(s)
	})
}

// RequireOpener opens slots until one opens whose wrapper may open the keyring at start.
// Otherwise it says why the last one did not open, or that there is none. A suspension
// does not count, because it ends. A slot for a next boot opens only in that boot.
func (n *Node) RequireOpener(ctx context.Context, k *keyring.Keyring, slots []seal.Slot) error {
	refusal := errors.New("it is the last slot that can open the keyring on this node; add another one first")
	for _, s := range slots {
		if !slices.Contains(n.Config.Unlock.Order, s.Type) || s.Node != "" && s.Node != n.Config.Node || n.View.Suspends(s) {
			continue
		}
		err := n.TryOpen(ctx, s, k.CurrentID(), k.ClusterID())
		if err == nil {
			return nil
		}
		refusal = fmt.Errorf("no other slot opens the keyring on this node now: %w", n.Gate.Explain(err))
	}
	return refusal
}

// RunningSlot returns the index of the slot that names the whole running boot, and its
// demand; the index is -1 if there is none.
func (n *Node) RunningSlot(slots []seal.Slot) (int, tpm.Demand) {
	demands := n.View.Demands(slots)
	for _, i := range slices.Sorted(maps.Keys(demands)) {
		d := demands[i]
		if (d.State.Use == tpm.UsePresent || d.State.Use == tpm.UseNext) && n.IsPresent(d.State) {
			return i, d
		}
	}
	return -1, tpm.Demand{}
}
