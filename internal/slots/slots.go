package slots

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/tpm"
)

// Add wraps the KEK with another wrapper. A slot of a token or a server replaces the
// existing one; a recovery slot replaces one that was left out.
func Add(ctx context.Context, n *node.Node, req admin.AddSlotRequest) (admin.KeyringState, error) {
	var bound string
	var made bool
	err := n.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		if !req.BreakTwoOfTwo {
			if err := n.View.CheckAdd(req.Type, k.Slots()); err != nil {
				return nil, err
			}
		}
		w, err := wrapperFor(n, req)
		if err != nil {
			return nil, err
		}
		if req.GenerateKey {
			if _, err := n.HSM.GenerateKey(ctx); err != nil {
				return nil, err
			}
			made = true
		} else if err := n.CheckKeyOf(ctx, k, w); err != nil {
			return nil, err
		}
		slot, err := w.Wrap(ctx, k.KEK())
		if err != nil {
			return nil, err
		}
		if err := rotation.Prove(ctx, k.KEK(), []seal.Slot{slot}, []seal.Wrapper{w}); err != nil && req.Type != seal.TypeRecovery {
			return nil, err
		}
		bound = n.View.Binding(slot)
		next, err := k.WithSlots(append(slotview.StayBeside(k.Slots(), req.Type), slot))
		return []*keyring.Keyring{next}, err
	})
	if err != nil && made {
		err = node.HintKeyMade(err)
	}
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("slot add %s: %w", req.Type, err)
	}
	changes := []string{"the KEK is wrapped by " + req.Type + " as well: " + bound}
	if req.Type != seal.TypeRecovery && !slices.Contains(n.Config.Unlock.Order, req.Type) {
		changes = append(changes, "it opens nothing at start until unlock.order names "+req.Type)
	}
	return n.Unchanged(changes...)
}

func wrapperFor(n *node.Node, req admin.AddSlotRequest) (seal.Wrapper, error) {
	switch {
	case req.Type == seal.TypeRecovery:
		return recovery.NewWrapper(n.Memory, req.Recipients)
	case req.Type == seal.TypeTPM, slotview.Second(req.Type) != "":
		return nil, errors.New("run kleidi reseal, which seals to the running boot")
	case req.Type == seal.TypePKCS11 && n.HSM == nil:
		return nil, errors.New("no token is configured; set pkcs11.module and pkcs11.uri, and restart kleidi serve")
	case req.Type == seal.TypeVault && n.Vault == nil:
		return nil, errors.New("no server is configured; set vault.address and vault.key, and restart kleidi serve")
	case req.Type == seal.TypeKMSPlugin && n.Wrapper(req.Type) == nil:
		return nil, errors.New("no plugin is configured; set kmsPlugin.socket, and restart kleidi serve")
	}
	w := n.Wrapper(req.Type)
	if w == nil {
		return nil, errors.New("there is no such wrapper; want pkcs11, vault, kms-plugin or recovery")
	}
	if req.GenerateKey && req.Type != seal.TypePKCS11 {
		return nil, errors.New("--generate-key is for pkcs11 alone")
	}
	return w, nil
}

// Remove removes a slot. A slot of this TPM is revoked with its epoch. Kept copies of
// other slots open the KEK until it is rotated.
func Remove(ctx context.Context, n *node.Node, req admin.RemoveSlotRequest) (admin.KeyringState, error) {
	var changes []string
	var before []seal.Slot // if a slot of this TPM is removed
	var gone seal.Slot
	err := n.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		slots := k.Slots()
		i, err := slotview.Find(slots, req.Name)
		if err != nil {
			return nil, err
		}
		if slotview.IsLastRecovery(slots, i) && !req.AcceptDataLoss {
			return nil, slotview.ErrLastRecovery
		}
		if gone = slots[i]; gone.Type == seal.TypeUnrevoked {
			return nil, errors.New("nothing is wrapped there; run kleidi slot forget-copies --ek EK, with an EK that kleidi status shows")
		}
		rest := slices.Delete(slices.Clone(slots), i, i+1)
		if err := n.RequireOpener(ctx, k, rest); err != nil {
			return nil, err
		}
		if n.View.OfThisTPM(gone) && len(n.View.Demands(rest)) > 0 {
			live, err := n.LiveStates(ctx, rest, tpm.UsePresent, tpm.UseNext, tpm.UseSuspend, tpm.UseSigned)
			if err != nil {
				return nil, err
			}
			next, _, err := reseal.ReplaceBootStates(ctx, n, k, live)
			before = slots
			return []*keyring.Keyring{next}, err
		}
		// The last slot of this TPM, with no slot of a later epoch after it, leaves a
		// debt. The debt is paid when the keyring without the slot is stored, so a
		// crash in between forgets nothing.
		if n.View.OfThisTPM(gone) {
			before = slots
			rest, err = n.View.Owing(slots, rest)
		} else {
			changes = reportRemoved(gone, rest)
		}
		if err != nil {
			return nil, err
		}
		next, err := k.WithSlots(rest)
		return []*keyring.Keyring{next}, err
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("slot remove %s: %w", req.Name, err)
	}
	if before != nil {
		changes = append(changes, reseal.ReportRevoked(ctx, n, before, revokedByTPM)...)
	}
	state, err := n.Unchanged(append(changes, n.View.ReportStillNamed(n.OpenSlots(), slotview.TypeOf(gone))...)...)
	state.Owed = before != nil && !n.View.Revokes(before, n.OpenSlots())
	return state, err
}

// reportRemoved explains the consequences of removing a slot that does not belong to this
// TPM.
func reportRemoved(gone seal.Slot, rest []seal.Slot) []string {
	if gone.Type == seal.TypeSkipped {
		return []string{"the placeholder is gone from the keyring; it held no slot"}
	}
	changes := []string{"the slot is gone from the keyring; kept copies of it still open the KEK: run kleidi rotate"}
	if gone.Type == seal.TypeRecovery && !slices.ContainsFunc(rest, func(s seal.Slot) bool { return s.Type == seal.TypeRecovery }) {
		changes = append(changes, "NO RECOVERY SLOT IS LEFT: if the TPM or the machine fails, all Secrets are lost; run kleidi slot add recovery --recipient age1…")
	}
	return changes
}

const revokedByTPM = "the TPM no longer opens it, kept copies included"

// Rewrap wraps the KEK again in place of a slot: with the newest version of its key,
// for the same boot state or recipients.
func Rewrap(ctx context.Context, n *node.Node, req admin.RewrapSlotRequest) (admin.KeyringState, error) {
	var bound string
	err := n.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		slots := k.Slots()
		i, err := slotview.Find(slots, req.Name)
		if err != nil {
			return nil, err
		}
		if d, ok := slotview.MissingOf(slots[i]); ok {
			return nil, errors.New("a rotation skipped this slot, so there is nothing to rewrap; " + n.View.Remedy(d, slots))
		}
		wrap := wrapAgain
		if req.NewKey {
			wrap = rewrapByNewKey
		}
		rewrapped, err := wrap(ctx, n, k, slots[i])
		if err != nil {
			return nil, err
		}
		if err := rotation.ProveTryable(ctx, k.KEK(), []seal.Slot{rewrapped}, n.Wrappers()); err != nil {
			return nil, err
		}
		slots[i] = rewrapped
		bound = n.View.Binding(slots[i])
		next, err := k.WithSlots(slots)
		return []*keyring.Keyring{next}, err
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("slot rewrap %s: %w", req.Name, err)
	}
	changes := []string{"the slot is wrapped again: " + bound}
	if req.NewKey {
		changes = append(changes, "kept copies of the former one still open with the key that made it: run kleidi rotate")
	}
	return n.Unchanged(changes...)
}

// wrapAgain lets Vault rewrap its own ciphertext, so that the KEK does not cross the
// network. If Vault can't, and for all other wrappers, it wraps the open KEK again.
func wrapAgain(ctx context.Context, n *node.Node, k *keyring.Keyring, s seal.Slot) (seal.Slot, error) {
	if s.Type == seal.TypeVault && n.Vault != nil {
		if rewrapped, err := n.Vault.Rewrap(ctx, s); err == nil {
			return rewrapped, nil
		}
	}
	slots, err := rotation.Like(n.ProvenRewrappers(k), []seal.Slot{s})(ctx, k.KEK())
	if err != nil {
		return seal.Slot{}, err
	}
	return slots[0], nil
}

// rewrapByNewKey wraps the KEK with the configured key, in place of a slot that another
// key may have made.
func rewrapByNewKey(ctx context.Context, n *node.Node, k *keyring.Keyring, s seal.Slot) (seal.Slot, error) {
	w := n.Wrapper(s.Type)
	if !slotview.HasBackend(s.Type) || w == nil {
		return seal.Slot{}, errors.New("--new-key is for slots of a token or a server that is configured")
	}
	pair, ok := w.(*both.Wrapper)
	if !ok {
		return w.Wrap(ctx, k.KEK())
	}
	first, _, err := both.Parts(s)
	if err != nil {
		return seal.Slot{}, err
	}
	return pair.WrapWith(ctx, k.KEK(),
		func(ctx context.Context, share *seal.Secret) (seal.Slot, error) {
			return pair.First.WrapLike(ctx, share, first)
		}, pair.Second.Wrap)
}
