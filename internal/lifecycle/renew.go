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

// SealToNewTPM does the work of recover, without the recovery identity, while the
// keyring is open by other means than the TPM: by a fallback, or because the TPM was
// cleared under a running serve. It trusts the present TPM without a check, as init
// does.
func SealToNewTPM(ctx context.Context, n *node.Node, req admin.ResealRequest) (admin.KeyringState, error) {
	var former seal.KeyID
	var changes []string
	var before []seal.Slot
	err := n.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		if err := checkNewTPM(ctx, n, k.Slots()); err != nil {
			return nil, err
		}
		if !req.BreakTwoOfTwo {
			if err := n.View.CheckRecovery(k.Slots()); err != nil {
				return nil, err
			}
		}
		if err := n.CheckSecondKey(ctx, k); err != nil {
			return nil, err
		}
		former, changes = k.CurrentID(), append(reportRenewed(n, k), n.View.ReportBroken(k.Slots())...)
		revisions, err := renew(ctx, n, k, renewOptions{WithoutVerifier: req.WithoutVerifier, UntrustedKeys: n.UntrustedKeys(ctx, k)})
		if err != nil {
			return nil, err
		}
		before = k.Slots()
		last := revisions[len(revisions)-1]
		if last.CurrentID() == former && several(k) {
			changes[0] = sealedAlone
		} else if last.CurrentID() == former {
			changes[0] = "the former KEK is sealed to this machine's present boot state: the keyring has no room for another retired KEK"
		}
		changes = slices.Concat(changes, reportAborted(k.StagedID(), last), n.View.ReportMissing(last.Slots()), slotview.ReportDropped(k.Slots(), last.Slots()))
		return revisions, nil
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("reseal --new-tpm: %w", err)
	}
	if n.Unlocker.State().Fallback != nil {
		n.Unlocker.Nudge() // the TPM opens now; a reload notices that
	}
	return n.Result(former, slices.Concat(changes, reseal.ReportRevoked(ctx, n, before, reseal.EarlierEpoch))...)
}

// checkNewTPM reports whether no slot of this node is sealed to this machine's TPM.
func checkNewTPM(ctx context.Context, n *node.Node, slots []seal.Slot) error {
	if !n.View.OpensWithTPM() {
		return reseal.ErrNoTPM
	}
	w, err := n.TPM.With(tpm.SealOptions{SameTPMAs: slotview.TPMParts(slots)})
	if err != nil {
		return err
	}
	if len(n.View.Demands(slots)) == 0 {
		return nil
	}
	_, err = w.Epoch(ctx)
	switch seal.CauseOf(err) {
	case seal.CauseOtherTPM, seal.CauseTPMCleared:
		return nil
	case "":
		return errors.New("the slots are sealed to this TPM; run kleidi reseal without --new-tpm")
	}
	return err
}

// renewOptions say whom the fresh slots trust.
type renewOptions struct {
	// WithoutVerifier makes slots that need no remote verifier.
	WithoutVerifier bool
	// UntrustedKeys are the wrappers that receive no KEK, by type, each with the
	// reason.
	UntrustedKeys map[string]error
}

// renew rotates to a fresh KEK that is sealed to the present boot state; the recovery
// slots stay. If the keyring has no room for another retired KEK, renew seals the same
// KEK again without rotating, because a keyring that opens is more important. In a keyring
// of several nodes the KEK stays too, see renewAlone.
func renew(ctx context.Context, n *node.Node, old *keyring.Keyring, o renewOptions) ([]*keyring.Keyring, error) {
	if err := n.View.CheckFreshKEK(old); err != nil {
		return nil, err
	}
	v, err := n.Remote.DemandUnless(o.WithoutVerifier, old.ClusterID())
	if err != nil {
		return nil, err
	}
	self, err := describeSelf(ctx, n, old.Format())
	if err != nil {
		return nil, err
	}
	former := append(old.Slots(), old.StagedSlots()...)
	owing := slices.Concat(former, replacedSlots(ctx, n))
	// renew also wraps the present KEK again: the first revision of the rotation must
	// open too.
	next, err := n.TPM.With(tpm.SealOptions{NextEpoch: true, Revoke: slotview.TPMParts(former), Verifier: v})
	if err != nil {
		return nil, err
	}
	wrap := func(ctx context.Context, kek *seal.Secret) ([]seal.Slot, error) {
		slots, err := renewSlots(ctx, n, next, kek, old.Slots(), o.UntrustedKeys)
		if err != nil {
			return nil, err
		}
		return n.View.Owing(owing, slots)
	}
	if several(old) {
		return renewAlone(ctx, n, next, old, self, owing)
	}
	slots, err := wrap(ctx, old.KEK())
	if err != nil {
		return nil, err
	}
	here, err := onThisMachine(old, self, slots)
	if err != nil {
		return nil, err
	}
	if slotview.Full(here) {
		return []*keyring.Keyring{here}, nil
	}
	defer here.Close()
	return rotation.Rotate(ctx, n.Memory, here, wrap, nil, time.Now())
}

// renewSlots wraps a KEK with every wrapper of this node, and for the recipients of the
// old recovery slots. It skips a token or a server that can't be reached, or is not
// configured here, if another slot opens: status then shows the missing slot until it
// is repaired.
func renewSlots(ctx context.Context, n *node.Node, tpmNow *tpm.Wrapper, kek *seal.Secret, old []seal.Slot, untrusted map[string]error) ([]seal.Slot, error) {
	var slots, kept []seal.Slot
	var failure error
	if n.View.OpensWithTPM() {
		slot, err := reseal.SealPresent(ctx, n, tpmNow, kek)
		if err != nil {
			return nil, err
		}
		slots = append(slots, slot)
	}
	for _, kind := range slotview.Secondary {
		at := slices.IndexFunc(old, func(s seal.Slot) bool { return slotview.TypeOf(s) == kind })
		if n.View.TwoOfTwo() != "" || at < 0 && !slices.Contains(n.Config.Unlock.Order, kind) {
			continue
		}
		var slot seal.Slot
		err := untrusted[kind]
		if err == nil {
			slot, err = wrapSecondary(ctx, n, kind, kek)
		}
		if err != nil {
			failure = errors.Join(failure, err)
			n.Log.Warn("a slot is left out", "slot", kind, "cause", seal.CauseOf(err), "error", err)
			if slot = (seal.Slot{Type: kind}); at >= 0 {
				slot = old[at]
			}
			if slot, err = slotview.Skip(slot); err != nil {
				return nil, err
			}
		}
		slots = append(slots, slot)
	}
	if !n.CanOpen(slots) {
		return nil, failure
	}
	for _, s := range old {
		if s.Type == seal.TypeRecovery {
			kept = append(kept, s)
		}
	}
	rewrapped, err := rotation.Like(n.Rewrappers(), kept)(ctx, kek)
	return append(slots, rewrapped...), err
}

// reportRenewed describes what renew does to a keyring.
func reportRenewed(n *node.Node, old *keyring.Keyring) []string {
	changes := []string{"a fresh KEK is wrapped by " + slotview.JoinWords(n.Config.Unlock.Order) + "; all earlier ones are retired and still decrypt"}
	if n.View.OpensWithTPM() {
		changes = []string{"a fresh KEK is sealed to this machine's present boot state; all earlier ones are retired and still decrypt"}
	}
	for _, s := range n.View.BootStates(old.Slots(), tpm.UseSigned) {
		changes = append(changes, fmt.Sprintf("the fresh KEK is not sealed to the boot states that key %.16s signed: run kleidi bootstate add FILE --public-key FILE, or kleidi bootstate add --systemd, with those of the latest generation", slotview.Fingerprint(*s.Signer)))
	}
	return changes
}
