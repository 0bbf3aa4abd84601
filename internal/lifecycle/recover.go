package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

// Recover opens the stored keyring with the recovery identity, seals a fresh KEK
// to the present boot state and makes it current. In a keyring of several nodes it seals
// the present KEK instead.
func Recover(ctx context.Context, n *node.Node, req admin.RecoverRequest) (admin.KeyringState, error) {
	state, err := replaceKeyring(ctx, n, func() (admin.KeyringState, error) { return recoverStored(ctx, n, req) })
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("recover: %w", err)
	}
	return state, nil
}

// replaceKeyring runs f, which replaces the stored keyring, and lets only one such
// operation run at a time. If this process did not hold the state folder before, and there
// is no keyring afterwards, it leaves the folder to init again.
func replaceKeyring(ctx context.Context, n *node.Node, f func() (admin.KeyringState, error)) (admin.KeyringState, error) {
	n.Replacing.Lock()
	defer n.Replacing.Unlock()
	if !n.State.Held() {
		defer func() {
			if _, _, err := n.Keyring.File.Load(context.WithoutCancel(ctx)); errors.Is(err, fs.ErrNotExist) {
				n.State.Release()
			}
		}()
	}
	if err := n.AcquireState(); err != nil {
		return admin.KeyringState{}, err
	}
	return f()
}

func recoverStored(ctx context.Context, n *node.Node, req admin.RecoverRequest) (admin.KeyringState, error) {
	untrusted, version, err := n.Stored(ctx)
	if err != nil {
		return admin.KeyringState{}, err
	}
	return recoverFrom(ctx, n, source{untrusted: untrusted, replaces: version}, req)
}

// checkOwnTPM refuses to list another TPM for this node in a stored keyring of several
// nodes whose changes count as made in the cluster store. The stored keyring may be
// behind the store, and its next revision would be a fork. A restored keyring has no
// store to ask.
func checkOwnTPM(k, next *keyring.Keyring) error {
	if several(k) && k.Info().Commit == keyring.CommitCluster && next.Revision() > k.Revision() {
		self, _ := k.Self()
		return errOtherTPM(self.Name)
	}
	return nil
}

// source is the keyring that a recovery starts from.
type source struct {
	untrusted *keyring.Untrusted
	replaces  store.Version // of the stored keyring
	restored  bool          // untrusted is not the stored keyring itself
}

// recoverFrom replaces the stored keyring with the content of the source.
func recoverFrom(ctx context.Context, n *node.Node, from source, req admin.RecoverRequest) (admin.KeyringState, error) {
	identity, err := n.Memory.Take(req.Identity)
	if err != nil {
		return admin.KeyringState{}, err
	}
	defer identity.Close()
	opener, err := recovery.NewOpener(n.Memory, identity)
	if err != nil {
		return admin.KeyringState{}, err
	}
	old, err := openWith(ctx, from.untrusted, opener)
	if err == nil && from.restored {
		old, err = asThisNode(n, old)
	}
	if err != nil {
		return admin.KeyringState{}, err
	}
	if !req.BreakTwoOfTwo {
		if err := n.View.CheckRecovery(old.Slots()); err != nil {
			old.Close()
			return admin.KeyringState{}, err
		}
	}
	changes := reportRenewed(n, old)
	if several(old) {
		changes = []string{sealedAlone}
	}
	renew := func(ctx context.Context, k *keyring.Keyring) ([]*keyring.Keyring, error) {
		revisions, err := renew(ctx, n, k, renewOptions{WithoutVerifier: req.WithoutVerifier})
		if err != nil {
			return nil, err
		}
		if from.restored {
			return revisions, nil
		}
		if err := checkOwnTPM(k, revisions[len(revisions)-1]); err != nil {
			for _, next := range revisions {
				next.Close()
			}
			return nil, err
		}
		return revisions, nil
	}
	before, staged := old.Slots(), old.StagedID()
	state, err := adopt(ctx, n, adoption{
		opened: old, by: unlock.Opener{Wrapper: opener.Type()}, openers: []seal.Wrapper{opener},
		replaces: from.replaces, trusted: req.TrustKeyID, revise: renew, changes: changes,
	})
	if err != nil {
		return state, err
	}
	k, err := n.Unlocker.Keyring()
	if err == nil {
		state.Changes = slices.Concat(state.Changes, reportAborted(staged, k), n.View.ReportMissing(k.Slots()), slotview.ReportDropped(before, k.Slots()), reseal.ReportRevoked(ctx, n, before, reseal.EarlierEpoch))
	}
	return state, err
}

// asThisNode returns a keyring of several nodes with an empty own section of this node in
// place of another node's, if the keyring lists this node. The cluster store's keyring
// has no own section at all.
func asThisNode(n *node.Node, k *keyring.Keyring) (*keyring.Keyring, error) {
	name := n.Config.Node
	self, known := k.Self()
	listed := slices.ContainsFunc(k.Nodes(), func(other keyring.Node) bool { return other.Name == name })
	if !several(k) || !listed || known && self.Name == name {
		return k, nil
	}
	defer k.Close()
	return k.OnNode(name, nil, nil)
}

func openWith(ctx context.Context, untrusted *keyring.Untrusted, opener *recovery.Wrapper) (*keyring.Keyring, error) {
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

// adoption is a keyring that was opened without the anchor, to become this node's keyring.
type adoption struct {
	opened   *keyring.Keyring
	by       unlock.Opener  // the wrapper that opened it
	openers  []seal.Wrapper // they also open its staged KEK
	replaces store.Version  // of the stored keyring
	trusted  seal.KeyID     // the key ID that the operator vouches for, or ""
	// revise returns the revisions to save. With a fresh KEK, no key ID flips back.
	revise  func(context.Context, *keyring.Keyring) ([]*keyring.Keyring, error)
	changes []string // reported unless there is no room for a fresh KEK
}

// adopt makes a keyring this node's keyring, once something vouches for it.
func adopt(ctx context.Context, n *node.Node, a adoption) (admin.KeyringState, error) {
	opened, changes := a.opened, a.changes
	defer opened.Close()
	if err := n.CheckAnchorable(ctx); err != nil {
		return admin.KeyringState{}, err
	}
	open := rotation.OpenStaged // all nodes together decide whether to activate a staged KEK
	if !several(opened) {
		open = func(ctx context.Context, k *keyring.Keyring, openers []seal.Wrapper) (*keyring.Keyring, error) {
			return rotation.Complete(ctx, k, openers, time.Now())
		}
	}
	old, err := open(ctx, opened, a.openers)
	if err != nil && (several(opened) || a.trusted == opened.CurrentID() && seal.CauseOf(err) != seal.CauseUnavailable) { // other nodes hold the staged KEK, or the operator vouches: go on without it
		old, err = opened, nil
	}
	if err != nil {
		return admin.KeyringState{}, err
	}
	defer old.Close()
	revision, err := vouch(ctx, n, old, opened.CurrentID(), a.trusted)
	if err != nil {
		return admin.KeyringState{}, err
	}
	raised, err := raise(old, revision)
	if err != nil {
		return admin.KeyringState{}, err
	}
	if raised != old {
		defer raised.Close()
	}
	revisions, err := a.revise(ctx, raised)
	if err != nil {
		return admin.KeyringState{}, err
	}
	if revisions[len(revisions)-1].CurrentID() == old.CurrentID() && !several(old) {
		changes = []string{"the keyring opens again under its former KEK: it has no room for another retired KEK"}
	}
	if err := n.Unlocker.Adopt(ctx, a.replaces, a.by, opened, revisions); err != nil {
		return admin.KeyringState{}, err
	}
	return n.Result(old.CurrentID(), changes...)
}

// raise returns the keyring with a revision not below the one that the node last
// trusted. A keyring of several nodes keeps its revision if possible, because only the
// seat makes a new one.
func raise(old *keyring.Keyring, revision uint64) (*keyring.Keyring, error) {
	if several(old) {
		if old.Revision() >= revision {
			return old, nil
		}
		if err := keyring.CheckSeat(old); err != nil || old.Info().Commit == keyring.CommitCluster {
			return nil, fmt.Errorf("the keyring has revision %d, and this node last trusted revision %d; approve this node again and have it join, which brings the newest one", old.Revision(), revision)
		}
	}
	return old.AtLeast(revision)
}

// vouch checks that something vouches for the recovered keyring: the anchor and, if a
// keyring is open, the open keyring, whose KEK it must hold; otherwise the operator, who
// names id, the current key ID of the given keyring. It returns the lowest revision that
// the next keyring may have.
func vouch(ctx context.Context, n *node.Node, k *keyring.Keyring, id, trusted seal.KeyID) (uint64, error) {
	revision, err := vouchByAnchor(ctx, n, k, id, trusted)
	if err != nil {
		return 0, err
	}
	open, openErr := n.Unlocker.Keyring()
	if openErr != nil {
		return revision, nil
	}
	if trusted == "" && (open.ClusterID() != k.ClusterID() || !k.Holds(open.CurrentID())) {
		return 0, seal.Errorf(seal.CauseAnchor, "store the open one again with kleidi keyring save; or, to give it up with what was encrypted under it, name the key ID of the keyring to trust in --trust-key-id",
			"kleidi serve holds key ID %s open, which this keyring does not hold", open.CurrentID())
	}
	return max(revision, open.Revision()), nil
}

func vouchByAnchor(ctx context.Context, n *node.Node, k *keyring.Keyring, id, trusted seal.KeyID) (uint64, error) {
	anchor, err := n.Anchor.Load(ctx)
	switch {
	case trusted != "" && trusted != id && trusted != k.CurrentID():
		return 0, seal.Errorf(seal.CauseAnchor, "compare it with what this cluster used last", "the keyring's current key ID is %s, and --trust-key-id names %s", id, trusted)
	case trusted != "" && (err != nil || anchor == nil):
		return 0, nil
	case err != nil:
		if e, ok := errors.AsType[*seal.Error](err); ok && e.Cause == seal.CauseAnchor {
			err = &seal.Error{Cause: e.Cause, Err: e.Err, Hint: "run it again with --trust-key-id KEY_ID, the key ID that this cluster used last (docs/recovery.md says where to look, and not in this keyring)"}
		}
		return 0, err
	case anchor == nil:
		return 0, seal.Errorf(seal.CauseAnchor, "if that is the key ID that this cluster used last (docs/recovery.md says where to look, and not in this keyring), run it again with --trust-key-id KEY_ID",
			"there is no anchor to tell whether the keyring of key ID %s is this node's", id)
	case trusted == "" && (anchor.ClusterID != k.ClusterID() || !k.Holds(anchor.KeyID)):
		return 0, seal.Errorf(seal.CauseAnchor, "restore a newer keyring; or, if what was encrypted under the anchored key ID since may be lost, run it again with --trust-key-id and the key ID of the keyring to trust",
			"this node last trusted key ID %s, which the keyring does not hold", anchor.KeyID)
	}
	return anchor.Revision, nil
}
