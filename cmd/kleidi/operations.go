package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/seal/store"
)

// The operations run in serve, asked through the admin socket, or in the command
// itself, under the lock on the state folder.

func keyringMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return seal.Errorf(seal.CauseKeyringMissing, "run kleidi init, or kleidi keyring restore if there was one", "there is no keyring: %w", err)
	}
	return err
}

func (n *node) result(former seal.KeyID, changes ...string) (admin.KeyringState, error) {
	k, err := n.unlocker.Keyring()
	if err != nil {
		return admin.KeyringState{}, err
	}
	s := admin.KeyringState{CurrentKeyID: k.CurrentID(), Revision: k.Revision(), Changes: changes}
	if former != s.CurrentKeyID {
		s.Former = former
	}
	return s, nil
}

// rotate makes a fresh KEK the current one, in the same slots.
func (n *node) rotate(ctx context.Context, _ admin.RotateRequest) (admin.KeyringState, error) {
	var former seal.KeyID
	err := n.unlocker.Change(ctx, func(k *keyring.Keyring) (*keyring.Keyring, error) {
		former = k.CurrentID()
		return rotation.Rotate(ctx, n.mem, k, rotation.Like(n.rewrappers(), k.Slots()), n.openers(), time.Now())
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("rotate: %w", err)
	}
	return n.result(former, "a fresh KEK is current; the former one is retired and still decrypts",
		"kube-apiserver notices within about a minute; then rewrite stored Secrets: kubectl get secrets -A -o json | kubectl replace -f -")
}

// reseal seals the KEK to the present boot state, and revokes the slot of the
// earlier one.
func (n *node) reseal(ctx context.Context, _ admin.ResealRequest) (admin.KeyringState, error) {
	err := n.unlocker.Change(ctx, func(k *keyring.Keyring) (*keyring.Keyring, error) {
		slot, err := n.sealNow(ctx, k.KEK())
		if err != nil {
			return nil, err
		}
		return k.WithSlots(rotation.Replace(k.Slots(), slot))
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("reseal: %w", err)
	}
	k, err := n.unlocker.CurrentID()
	if err != nil {
		return admin.KeyringState{}, err
	}
	return n.result(k, "the KEK is sealed to the present boot state", "slots of the earlier epoch no longer open, kept copies included")
}

// sealNow seals kek to the present boot state for the next epoch, and opens what
// it made before anything relies on it.
func (n *node) sealNow(ctx context.Context, kek *seal.Secret) (seal.Slot, error) {
	slot, err := n.tpm.ForNextEpoch().Wrap(ctx, kek)
	if err != nil {
		return slot, err
	}
	return slot, rotation.Prove(ctx, kek, []seal.Slot{slot}, n.openers())
}

// recover opens the stored keyring with the recovery identity, seals a fresh KEK
// to the present boot state and makes it current.
func (n *node) recover(ctx context.Context, req admin.RecoverRequest) (admin.KeyringState, error) {
	state, err := n.recoverStored(ctx, req)
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("recover: %w", err)
	}
	return state, nil
}

func (n *node) recoverStored(ctx context.Context, req admin.RecoverRequest) (admin.KeyringState, error) {
	if err := lockProcess(n.mem); err != nil {
		return admin.KeyringState{}, err
	}
	untrusted, version, err := n.stored(ctx)
	if err != nil {
		return admin.KeyringState{}, err
	}
	return n.recoverFrom(ctx, untrusted, version, req)
}

// recoverFrom replaces the stored keyring of that version by what untrusted holds.
func (n *node) recoverFrom(ctx context.Context, untrusted *keyring.Untrusted, version store.Version, req admin.RecoverRequest) (admin.KeyringState, error) {
	old, err := n.openWithIdentity(ctx, untrusted, req.Identity)
	if err != nil {
		return admin.KeyringState{}, err
	}
	defer old.Close()
	revision, err := n.vouch(ctx, old, req.TrustKeyID)
	if err != nil {
		return admin.KeyringState{}, err
	}
	next, err := n.renew(ctx, old, revision)
	if err != nil {
		return admin.KeyringState{}, err
	}
	if err := n.unlocker.Adopt(ctx, next, version, seal.TypeRecovery); err != nil {
		return admin.KeyringState{}, err
	}
	return n.result(old.CurrentID(), "a fresh KEK is sealed to this machine's present boot state; all earlier ones are retired and still decrypt",
		"slots of the earlier epoch no longer open, kept copies included")
}

func (n *node) openWithIdentity(ctx context.Context, untrusted *keyring.Untrusted, identity []byte) (*keyring.Keyring, error) {
	secret, err := n.mem.Take(identity)
	if err != nil {
		return nil, err
	}
	defer secret.Close()
	opener, err := recovery.NewOpener(n.mem, secret)
	if err != nil {
		return nil, err
	}
	for _, slot := range untrusted.Slots() {
		kek, err := opener.Unwrap(ctx, slot)
		if errors.Is(err, seal.ErrNotMine) {
			continue
		}
		if err != nil {
			return nil, err
		}
		k, err := untrusted.Open(kek, nil) // vouch follows
		if err != nil {
			kek.Close()
		}
		return k, err
	}
	return nil, seal.Errorf(seal.CauseNoSlot, "use the recovery identity that was made, or whose recipient was given, at kleidi init",
		"no recovery slot of the keyring opens with this identity")
}

// vouch says by what the recovered keyring is trusted: the pin, else the
// operator, who names its key ID. It returns the revision that the next one must
// not be below.
func (n *node) vouch(ctx context.Context, k *keyring.Keyring, trusted seal.KeyID) (uint64, error) {
	pin, err := n.pin.Load(ctx)
	switch {
	case trusted != "" && trusted != k.CurrentID():
		return 0, seal.Errorf(seal.CausePin, "compare it with what this cluster used last", "the keyring's current key ID is %s, and --trust-key-id names %s", k.CurrentID(), trusted)
	case trusted != "" && (err != nil || pin == nil):
		return 0, nil
	case err != nil:
		return 0, err
	case pin == nil:
		return 0, seal.Errorf(seal.CausePin, "if that is the key ID that this cluster used last (see docs/recovery.md), run it again with --trust-key-id "+string(k.CurrentID()),
			"there is no pin to tell whether the keyring of key ID %s is this node's", k.CurrentID())
	case trusted == "" && (pin.ClusterID != k.ClusterID() || !k.Holds(pin.KeyID)):
		return 0, seal.Errorf(seal.CausePin, "restore a newer keyring; or, if what was encrypted under the pinned key ID since may be lost, run it again with --trust-key-id "+string(k.CurrentID()),
			"this node last trusted key ID %s, which the keyring does not hold", pin.KeyID)
	}
	return pin.Revision, nil
}

// renew seals a fresh KEK to the present boot state; the recovery slots stay.
func (n *node) renew(ctx context.Context, old *keyring.Keyring, revision uint64) (*keyring.Keyring, error) {
	ek, err := n.tpm.Provision(ctx)
	if err != nil {
		return nil, err
	}
	wrap := func(ctx context.Context, kek *seal.Secret) ([]seal.Slot, error) {
		slot, err := n.sealNow(ctx, kek)
		if err != nil {
			return nil, err
		}
		var kept []seal.Slot
		for _, s := range old.Slots() {
			if s.Type == seal.TypeRecovery {
				kept = append(kept, s)
			}
		}
		rewrapped, err := rotation.Like(n.rewrappers(), kept)(ctx, kek)
		return append([]seal.Slot{slot}, rewrapped...), err
	}
	raised, err := old.AtLeast(revision)
	if err != nil {
		return nil, err
	}
	defer raised.Close()
	rotated, err := rotation.Rotate(ctx, n.mem, raised, wrap, nil, time.Now())
	if err != nil {
		return nil, err
	}
	defer rotated.Close()
	return rotated.WithNodes([]keyring.Node{{Name: n.cfg.Node, EK: ek}}, rotated.Slots())
}

// verify proves the stored keyring: it opens with a slot, its MAC verifies and
// the pin agrees. Nothing is changed.
func (n *node) verify(ctx context.Context, _ admin.VerifyRequest) (admin.KeyringState, error) {
	k, err := n.unlocker.Open(ctx)
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("verify: %w", err)
	}
	defer k.Close()
	return admin.KeyringState{CurrentKeyID: k.CurrentID(), Revision: k.Revision(), Changes: []string{
		"the stored keyring opens, its MAC verifies and the pin agrees",
		fmt.Sprintf("%d retired KEKs open", len(k.Info().Retired)),
	}}, nil
}

// reload has serve read the keyring anew.
func (n *node) reload(ctx context.Context, _ admin.ReloadRequest) (admin.KeyringState, error) {
	if err := n.unlocker.Unlock(ctx); err != nil {
		return admin.KeyringState{}, err
	}
	k, err := n.unlocker.CurrentID()
	if err != nil {
		return admin.KeyringState{}, err
	}
	return n.result(k, "the keyring was read anew")
}
