package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
)

// Restore replaces the stored keyring with another one.
func Restore(ctx context.Context, n *node.Node, req admin.RestoreRequest) (admin.KeyringState, error) {
	state, err := replaceKeyring(ctx, n, func() (admin.KeyringState, error) { return restoreFrom(ctx, n, req) })
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("restore: %w", err)
	}
	return state, nil
}

func restoreFrom(ctx context.Context, n *node.Node, req admin.RestoreRequest) (admin.KeyringState, error) {
	untrusted, err := keyring.Parse(req.Keyring)
	if err != nil {
		return admin.KeyringState{}, err
	}
	_, version, err := n.Keyring.File.Load(ctx)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return admin.KeyringState{}, seal.Errorf(seal.CauseStore, "move that file away, then run the command again", "the stored keyring: %w", err)
	}
	replaced := replacedSlots(ctx, n)
	state, err := restoreWith(ctx, n, untrusted, version, req)
	if err != nil {
		return state, err
	}
	k, err := n.Unlocker.Keyring()
	if err == nil {
		state.Changes = slices.Concat(state.Changes, n.View.ReportReturned(untrusted.Slots(), replaced, k.Slots()), n.View.ReportSingles(untrusted.Slots(), k.Slots()))
	}
	return state, err
}

// restoreWith replaces the stored keyring of that version. The new keyring opens with the
// recovery identity, or with any wrapper of this node.
func restoreWith(ctx context.Context, n *node.Node, untrusted *keyring.Untrusted, version store.Version, req admin.RestoreRequest) (admin.KeyringState, error) {
	if len(req.Identity) > 0 {
		if !req.BreakTwoOfTwo {
			if err := n.View.CheckAdd(seal.TypeRecovery, nil); err != nil { // the recovery slot comes back
				return admin.KeyringState{}, err
			}
		}
		return recoverFrom(ctx, n, source{untrusted: untrusted, replaces: version, restored: true},
			admin.RecoverRequest{Identity: req.Identity, TrustKeyID: req.TrustKeyID, BreakTwoOfTwo: req.BreakTwoOfTwo})
	}
	old, by, err := n.Unlocker.OpenUnanchored(ctx, untrusted)
	if err != nil {
		return admin.KeyringState{}, err
	}
	revise := func(ctx context.Context, k *keyring.Keyring) ([]*keyring.Keyring, error) {
		return rotateIfRoom(ctx, n, k, req)
	}
	change := "the keyring is restored; a fresh KEK is current, and all earlier ones still decrypt"
	if several(old) {
		revise = func(_ context.Context, k *keyring.Keyring) ([]*keyring.Keyring, error) { return asItWas(n, k, req) }
		change = "the keyring is restored as it was; all nodes keep its KEK, and no other node is affected"
	}
	state, err := adopt(ctx, n, adoption{
		opened: old, by: by, openers: n.Openers(), replaces: version, trusted: req.TrustKeyID, revise: revise, changes: []string{change},
	})
	if err != nil {
		return state, err
	}
	k, err := n.Unlocker.Keyring()
	if err == nil {
		state.Changes = append(state.Changes, n.View.ReportMissing(k.Slots())...)
	}
	return state, err
}

// asItWas returns a restored keyring of several nodes unchanged: all nodes together rotate
// its KEK.
func asItWas(n *node.Node, k *keyring.Keyring, req admin.RestoreRequest) ([]*keyring.Keyring, error) {
	if len(req.SkipSlots) > 0 {
		return nil, errors.New("--skip-slot: the keyring has several nodes, and comes back in the slots that it has; leave --skip-slot out, and remove the slot afterwards")
	}
	if self, ok := k.Self(); !ok || self.Name != n.Config.Node {
		return nil, seal.Errorf("", "restore it with --identity-file, which takes the copy of any node", "the keyring is the copy of another node than %s", n.Config.Node)
	}
	if !req.BreakTwoOfTwo {
		if err := n.View.CheckRestore(k, nil); err != nil {
			return nil, err
		}
	}
	same, err := k.WithOwnSlots(k.OwnSlots(), k.OwnStagedSlots())
	return []*keyring.Keyring{same}, err
}

// rotateIfRoom rotates a restored keyring in its slots, except those to skip. If there
// is no room for another retired KEK, it does not rotate: it stores the keyring under
// its own KEK, one revision higher.
func rotateIfRoom(ctx context.Context, n *node.Node, k *keyring.Keyring, req admin.RestoreRequest) ([]*keyring.Keyring, error) {
	if slotview.Full(k) && len(req.SkipSlots) > 0 {
		return nil, errors.New("--skip-slot: the keyring holds no more retired KEKs, so it comes back under the KEK and in the slots that it has; leave --skip-slot out")
	}
	if !req.BreakTwoOfTwo {
		if err := n.View.CheckRestore(k, req.SkipSlots); err != nil {
			return nil, err
		}
	}
	if !slotview.Full(k) {
		revisions, err := rotateKeyring(ctx, n, k, rotateOptions{
			Skip: req.SkipSlots, BreakTwoOfTwo: req.BreakTwoOfTwo,
			AcceptDataLoss: req.AcceptDataLoss || n.View.TwoOfTwo() != "", // a recovery slot would break two-of-two, and is left out
		})
		return revisions, hintIdentity(hintSkip(n, k, err, "run it again with"))
	}
	next, err := k.AtLeast(0)
	return []*keyring.Keyring{next}, err
}

// hintIdentity adds a hint for a keyring that is being restored and is not open yet.
func hintIdentity(err error) error {
	if _, ok := errors.AsType[*node.OtherKeyError](err); !ok {
		return err
	}
	return seal.WithHint(err, node.HintSameKey+"; or restore with --identity-file, which trusts the present one")
}
