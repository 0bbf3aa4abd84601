package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/tpm"
)

// Rotate makes a fresh KEK the current one, in the same slots. The keyring must have one
// node; package rollout rotates those of several.
func Rotate(ctx context.Context, n *node.Node, req admin.RotateRequest) (admin.KeyringState, error) {
	var former seal.KeyID
	var before []seal.Slot
	err := n.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		former, before = k.CurrentID(), k.Slots()
		if err := CheckConfirmed(ctx, n, k, req.Confirmed); err != nil {
			return nil, err
		}
		all, err := addMissing(ctx, n, k, req.SkipSlots)
		if err != nil {
			return nil, err
		}
		if all != k {
			defer all.Close()
		}
		revisions, err := rotateKeyring(ctx, n, all, rotateOptions{Skip: req.SkipSlots, AcceptDataLoss: req.AcceptDataLoss})
		if err != nil {
			err = hintSkip(n, all, err, "run kleidi rotate")
		}
		return revisions, err
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("rotate: %w", err)
	}
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return admin.KeyringState{}, err
	}
	changes := slices.Concat([]string{"a fresh KEK is current; the former one is retired and still decrypts"}, n.View.ReportCompleted(before, k.Slots()), n.View.ReportMissing(k.Slots()), slotview.ReportRoom(k))
	return n.Result(former, append(changes, "kube-apiserver encrypts under it within three minutes; then rewrite the stored objects: kleidi migrate")...)
}

// CheckConfirmed refuses to give a fresh KEK to slots that no command on this node made,
// unless the operator has seen and confirmed each of them. The record then includes them.
func CheckConfirmed(ctx context.Context, n *node.Node, k *keyring.Keyring, confirmed []string) error {
	c := n.Slots.Outside(ctx, k.ClusterID().String(), k.Slots())
	if c.None() {
		return nil
	}
	if slices.ContainsFunc(c.IDs(), func(id string) bool { return !slices.Contains(confirmed, id) }) {
		return seal.Errorf("", slotview.HintOutside, "the keyring was changed from outside, and nobody has confirmed that: %s; nothing was changed", slotview.JoinWords(c.Describe()))
	}
	n.Slots.Confirm(k)
	return nil
}

// rotateOptions say what a rotation may leave out, and what it may break.
type rotateOptions struct {
	Skip          []string // names of slots that the fresh KEK lacks
	BreakTwoOfTwo bool     // the TPM may open alone, although two were needed
	// AcceptDataLoss allows a fresh KEK without any recovery slot.
	AcceptDataLoss bool
}

// rotateKeyring replaces the KEK in every slot of k except those to skip.
func rotateKeyring(ctx context.Context, n *node.Node, k *keyring.Keyring, o rotateOptions) ([]*keyring.Keyring, error) {
	if several(k) {
		return nil, seal.Errorf("", "start kleidi serve, and run kleidi rotate there", "the keyring has %d nodes, whose KEK only a running kleidi serve replaces; nothing was changed", len(k.Nodes()))
	}
	if slotview.Full(k) {
		return nil, seal.Errorf(seal.CauseStore, "remove a retired KEK with kleidi prune KEYID; until then the keyring goes on serving, and recover and reseal go on working (see docs/operations.md)",
			"the keyring holds %d retired KEKs, and no more fit", keyring.MaxRetired)
	}
	wrap, err := wrapLike(ctx, n, k, o)
	if err != nil {
		return nil, err
	}
	return rotation.Rotate(ctx, n.Memory, k, wrap, n.Wrappers(), time.Now())
}

// addMissing adds a slot, or a placeholder for a skipped one, for each wrapper of
// unlock.order that has none, because a rotation follows the existing slots. It leaves
// the TPM to reseal, which trusts a new TPM only when told so. Beside a two-of-two it
// adds nothing that would open alone. If nothing is missing, it returns k itself.
func addMissing(ctx context.Context, n *node.Node, k *keyring.Keyring, without []string) (*keyring.Keyring, error) {
	slots := k.Slots()
	all := n.View.WithMissing(slots)
	names := slotview.Names(all)
	for i := len(slots); i < len(all); i++ {
		s, kind := all[i], slotview.TypeOf(all[i])
		var err error
		switch {
		case slices.Contains(without, names[i]):
			s, err = slotview.Skip(seal.Slot{Type: kind, Node: s.Node})
		case s.Node != "" || n.View.CheckAdd(kind, k.Slots()) != nil:
			continue
		default:
			s, err = wrapSecondary(ctx, n, kind, k.KEK())
		}
		if err != nil {
			return nil, noSlotYet(kind, err)
		}
		slots = append(slots, s)
	}
	if len(slots) == len(k.Slots()) {
		return k, nil
	}
	return k.WithSlots(slots)
}

// WrapShared makes the slots of a new KEK that several nodes share, as Rotate makes the
// slots of one node. Each node makes its own slots.
func WrapShared(ctx context.Context, n *node.Node, k *keyring.Keyring, req admin.RotateRequest) (rotation.Wrap, error) {
	all, err := addMissing(ctx, n, k, req.SkipSlots)
	if err != nil {
		return nil, err
	}
	if all != k {
		defer all.Close()
	}
	slots, err := skipSlots(all.Slots(), rotateOptions{Skip: req.SkipSlots, AcceptDataLoss: req.AcceptDataLoss})
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(slots, func(s seal.Slot) bool { return s.Node != "" && s.Type == seal.TypeSkipped }) {
		return nil, errors.New("--skip-slot: every node keeps its own slots; name a shared one")
	}
	wrap := rotation.Like(n.ProvenRewrappers(k), slices.DeleteFunc(slots, func(s seal.Slot) bool { return s.Node != "" }))
	return func(ctx context.Context, kek *seal.Secret) ([]seal.Slot, error) {
		made, err := wrap(ctx, kek)
		if err != nil {
			return nil, hintSkip(n, k, err, "run kleidi rotate")
		}
		return made, rotation.ProveTryable(ctx, kek, made, n.Wrappers())
	}, nil
}

// skipSlots puts a placeholder in the place of each slot to skip.
func skipSlots(slots []seal.Slot, o rotateOptions) ([]seal.Slot, error) {
	skipped, err := slotview.Places(slots, o.Skip)
	if err != nil {
		return nil, fmt.Errorf("--skip-slot: %w", err)
	}
	if slotview.IsLastRecovery(slots, skipped...) && !o.AcceptDataLoss {
		return nil, fmt.Errorf("--skip-slot: %w", slotview.ErrLastRecovery)
	}
	for _, i := range skipped {
		if slots[i], err = slotview.Skip(slots[i]); err != nil {
			return nil, err
		}
	}
	return slots, nil
}

// wrapLike makes the slots of a new KEK like those of the present one, except the
// skipped slots. A placeholder records that a slot was left out.
func wrapLike(ctx context.Context, n *node.Node, k *keyring.Keyring, o rotateOptions) (rotation.Wrap, error) {
	slots, err := skipSlots(k.Slots(), o)
	if err != nil {
		return nil, err
	}
	if len(o.Skip) > 0 && !n.CanOpen(slots) {
		return nil, errors.New("--skip-slot: no slot would be left that can open the keyring on this node; skip fewer, or add another one first")
	}
	live, err := n.Unrevoked(ctx, slots)
	if err != nil {
		return nil, err
	}
	like := rotation.Like(n.ProvenRewrappers(k), live)
	if len(live) == len(slots) || len(n.View.Demands(live)) > 0 || !n.View.OpensWithTPM() {
		return like, nil
	}
	// If all slots of this TPM are revoked, as in an old keyring, the running boot
	// takes their place.
	if !o.BreakTwoOfTwo {
		if err := n.View.CheckSeal(k.Slots()); err != nil {
			return nil, err
		}
	}
	if err := n.CheckSecondKey(ctx, k); err != nil {
		return nil, err
	}
	v, err := n.Remote.Demand(k.ClusterID())
	if err != nil {
		return nil, err
	}
	w, err := n.TPM.With(tpm.SealOptions{Verifier: v})
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, kek *seal.Secret) ([]seal.Slot, error) {
		slot, err := reseal.SealPresent(ctx, n, w, kek)
		if err != nil {
			return nil, err
		}
		others, err := like(ctx, kek)
		return append([]seal.Slot{slot}, others...), err
	}, nil
}

// hintSkip adds to the refusal of a rotation that the slot can be left out, and how.
func hintSkip(n *node.Node, k *keyring.Keyring, err error, how string) error {
	e, ok := errors.AsType[*rotation.SlotError](err)
	if !ok {
		return err
	}
	rest := slices.DeleteFunc(k.Slots(), func(s seal.Slot) bool { return slotview.Identity(s) == slotview.Identity(e.Slot) })
	if !n.CanOpen(rest) {
		return err
	}
	return seal.AddHint(err, "to go on without the slot for now, "+how+" --skip-slot "+slotview.NameOf(k, e.Slot))
}

// noSlotYet explains why a wrapper without a slot can't make one.
func noSlotYet(kind string, err error) error {
	return fmt.Errorf("unlock.order names %s, which has no slot yet: %w", kind, seal.AddHint(err, "to go on without the slot for now, run kleidi rotate --skip-slot "+kind))
}
