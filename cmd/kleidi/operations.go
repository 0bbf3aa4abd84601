package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
	"github.com/beezy-dev/kleidi/tpm"
)

// The operations run in serve, asked through the admin socket, or in the command
// itself, under the lock on the state folder.

func keyringMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return seal.Errorf(seal.CauseKeyringMissing, unlock.HintMissing, "there is no keyring: %w", err)
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

// sealNow seals kek to the present boot state, and opens what it made before
// anything relies on it.
func (n *node) sealNow(ctx context.Context, w *tpm.Wrapper, kek *seal.Secret) (seal.Slot, error) {
	state, err := n.gate.State(ctx)
	if err != nil {
		return seal.Slot{}, err
	}
	slot, err := n.wrapState(ctx, w, kek, state)
	if err != nil {
		return slot, err
	}
	return slot, rotation.Prove(ctx, kek, []seal.Slot{slot}, n.openers())
}

// recover opens the stored keyring with the recovery identity, seals a fresh KEK
// to the present boot state and makes it current.
func (n *node) recover(ctx context.Context, req admin.RecoverRequest) (admin.KeyringState, error) {
	state, err := n.replace(ctx, func() (admin.KeyringState, error) { return n.recoverStored(ctx, req) })
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("recover: %w", err)
	}
	return state, nil
}

// replace runs f, which puts another keyring in the place of the stored one, as
// the only one to do so. Where there is none afterwards, and this process had
// left the state folder to init before, it does so again.
func (n *node) replace(ctx context.Context, f func() (admin.KeyringState, error)) (admin.KeyringState, error) {
	n.replacing.Lock()
	defer n.replacing.Unlock()
	if !n.state.held() {
		defer func() {
			if _, _, err := n.keyring.File.Load(context.WithoutCancel(ctx)); errors.Is(err, fs.ErrNotExist) {
				n.state.release()
			}
		}()
	}
	if err := n.own(); err != nil {
		return admin.KeyringState{}, err
	}
	return f()
}

func (n *node) recoverStored(ctx context.Context, req admin.RecoverRequest) (admin.KeyringState, error) {
	untrusted, version, err := n.stored(ctx)
	if err != nil {
		return admin.KeyringState{}, err
	}
	return n.recoverFrom(ctx, untrusted, version, req)
}

// recoverFrom replaces the stored keyring of that version by what untrusted holds.
func (n *node) recoverFrom(ctx context.Context, untrusted *keyring.Untrusted, version store.Version, req admin.RecoverRequest) (admin.KeyringState, error) {
	identity, err := n.mem.Take(req.Identity)
	if err != nil {
		return admin.KeyringState{}, err
	}
	defer identity.Close()
	opener, err := recovery.NewOpener(n.mem, identity)
	if err != nil {
		return admin.KeyringState{}, err
	}
	old, err := openWith(ctx, untrusted, opener)
	if err != nil {
		return admin.KeyringState{}, err
	}
	if !req.BreakTwoOfTwo {
		if err := n.keepsBoth(old.Slots()); err != nil {
			old.Close()
			return admin.KeyringState{}, err
		}
	}
	changes := n.renewed(old)
	renew := func(ctx context.Context, k *keyring.Keyring) ([]*keyring.Keyring, error) {
		return n.renew(ctx, k, req.WithoutVerifier, nil)
	}
	before := old.Slots()
	state, err := n.adopt(ctx, old, unlock.Opener{Wrapper: opener.Type()}, []seal.Wrapper{opener}, version, req.TrustKeyID, renew, changes...)
	if err != nil {
		return state, err
	}
	k, err := n.unlocker.Keyring()
	if err == nil {
		state.Changes = slices.Concat(state.Changes, n.leftOut(k.Slots()), dropped(before, k.Slots()))
	}
	return state, err
}

// renewed says what renew makes of a keyring.
func (n *node) renewed(old *keyring.Keyring) []string {
	changes := []string{"a fresh KEK is wrapped by " + joinWords(n.cfg.Unlock.Order) + "; all earlier ones are retired and still decrypt"}
	if n.opensWithTPM() {
		changes = []string{"a fresh KEK is sealed to this machine's present boot state; all earlier ones are retired and still decrypt",
			"slots of the earlier epoch no longer open, kept copies included"}
	}
	for _, s := range n.states(old.Slots(), tpm.UseSigned) {
		changes = append(changes, fmt.Sprintf("boot states that key %.16s signed no longer open: run kleidi bootstate add again, with those of the latest generation", fingerprintOf(*s.Signer)))
	}
	return changes
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

// adopt makes a keyring that was opened without the anchor this node's keyring, once
// it is vouched for, and has turn rotate it: so no key ID flips back.
func (n *node) adopt(ctx context.Context, opened *keyring.Keyring, by unlock.Opener, openers []seal.Wrapper, version store.Version, trusted seal.KeyID,
	turn func(context.Context, *keyring.Keyring) ([]*keyring.Keyring, error), changes ...string) (admin.KeyringState, error) {
	defer opened.Close()
	if err := n.anchorable(ctx); err != nil {
		return admin.KeyringState{}, err
	}
	old, err := rotation.Complete(ctx, opened, openers, time.Now())
	if err != nil && trusted == opened.CurrentID() && seal.CauseOf(err) != seal.CauseUnavailable { // the operator does without
		old, err = opened, nil
	}
	if err != nil {
		return admin.KeyringState{}, err
	}
	defer old.Close()
	revision, err := n.vouch(ctx, old, opened.CurrentID(), trusted)
	if err != nil {
		return admin.KeyringState{}, err
	}
	raised, err := old.AtLeast(revision)
	if err != nil {
		return admin.KeyringState{}, err
	}
	defer raised.Close()
	revisions, err := turn(ctx, raised)
	if err != nil {
		return admin.KeyringState{}, err
	}
	if revisions[len(revisions)-1].CurrentID() == old.CurrentID() {
		changes = []string{"the keyring opens again, under the KEK that it had: it has no room for another retired one"}
	}
	if err := n.unlocker.Adopt(ctx, version, by, revisions); err != nil {
		return admin.KeyringState{}, err
	}
	return n.result(old.CurrentID(), changes...)
}

// vouch says by what the recovered keyring is trusted: the anchor and, where one is
// open, the open keyring, whose KEK it has to hold; else the operator, who names
// id, the current key ID of the keyring as it was given. It returns the revision
// that the next one must not be below.
func (n *node) vouch(ctx context.Context, k *keyring.Keyring, id, trusted seal.KeyID) (uint64, error) {
	revision, err := n.vouchByAnchor(ctx, k, id, trusted)
	if err != nil {
		return 0, err
	}
	open, openErr := n.unlocker.Keyring()
	if openErr != nil {
		return revision, nil
	}
	if trusted == "" && (open.ClusterID() != k.ClusterID() || !k.Holds(open.CurrentID())) {
		return 0, seal.Errorf(seal.CauseAnchor, "store the open one again with kleidi keyring save; or, to give it up with what was encrypted under it, name the key ID of the keyring to trust in --trust-key-id",
			"kleidi serve holds key ID %s open, which this keyring does not hold", open.CurrentID())
	}
	return max(revision, open.Revision()), nil
}

func (n *node) vouchByAnchor(ctx context.Context, k *keyring.Keyring, id, trusted seal.KeyID) (uint64, error) {
	anchor, err := n.anchor.Load(ctx)
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

// renew rotates to a fresh KEK that is sealed to the present boot state; the
// recovery slots stay. A keyring that holds no more retired KEKs is sealed anew and
// not rotated: it has to open again first of all. Strangers get no KEK, by the reason of
// each.
func (n *node) renew(ctx context.Context, old *keyring.Keyring, withoutVerifier bool, strangers map[string]error) ([]*keyring.Keyring, error) {
	if err := n.freshForBoth(old); err != nil {
		return nil, err
	}
	v, err := n.remote.demand(old.ClusterID(), withoutVerifier)
	if err != nil {
		return nil, err
	}
	self := keyring.Node{Name: n.cfg.Node}
	if n.opensWithTPM() {
		if self.EK, err = n.tpm.Provision(ctx); err != nil {
			return nil, err
		}
	}
	// The present KEK is wrapped anew as well: the first revision of the rotation
	// has to open too.
	next := n.tpm.ForNextEpoch(halves(append(old.Slots(), old.StagedSlots()...))).Demanding(v)
	wrap := func(ctx context.Context, kek *seal.Secret) ([]seal.Slot, error) {
		return n.renewSlots(ctx, next, kek, old.Slots(), strangers)
	}
	slots, err := wrap(ctx, old.KEK())
	if err != nil {
		return nil, err
	}
	here, err := old.WithNodes([]keyring.Node{self}, slots)
	if err != nil {
		return nil, err
	}
	if full(here) {
		return []*keyring.Keyring{here}, nil
	}
	defer here.Close()
	return rotation.Rotate(ctx, n.mem, here, wrap, nil, time.Now())
}

// renewSlots wraps a KEK by every wrapper of this node, and for the recipients of
// the old recovery slots. A token or a server that can't be reached, or is not
// configured here, is skipped as long as another slot opens: status shows the place
// until it is mended.
func (n *node) renewSlots(ctx context.Context, tpmNow *tpm.Wrapper, kek *seal.Secret, old []seal.Slot, strangers map[string]error) ([]seal.Slot, error) {
	var slots, kept []seal.Slot
	var failure error
	if n.opensWithTPM() {
		slot, err := n.sealNow(ctx, tpmNow, kek)
		if err != nil {
			return nil, err
		}
		slots = append(slots, slot)
	}
	for _, kind := range []string{seal.TypePKCS11, seal.TypeVault} {
		at := slices.IndexFunc(old, func(s seal.Slot) bool { return typeName(s) == kind })
		if n.needsBoth() != "" || at < 0 && !slices.Contains(n.cfg.Unlock.Order, kind) {
			continue
		}
		var slot seal.Slot
		err := strangers[kind]
		if err == nil {
			slot, err = n.renewSecondary(ctx, kind, kek)
		}
		if err != nil {
			failure = errors.Join(failure, err)
			n.log.Warn("a slot is left out", "slot", kind, "cause", seal.CauseOf(err), "error", err)
			if slot = (seal.Slot{Type: kind}); at >= 0 {
				slot = old[at]
			}
			if slot, err = skip(slot); err != nil {
				return nil, err
			}
		}
		slots = append(slots, slot)
	}
	if !n.anyOpens(slots) {
		return nil, failure
	}
	for _, s := range old {
		if s.Type == seal.TypeRecovery {
			kept = append(kept, s)
		}
	}
	rewrapped, err := rotation.Like(n.rewrappers(), kept)(ctx, kek)
	return append(slots, rewrapped...), err
}

// renewSecondary wraps a KEK by the token or the server.
func (n *node) renewSecondary(ctx context.Context, kind string, kek *seal.Secret) (seal.Slot, error) {
	w := n.wrapper(kind)
	if w == nil {
		return seal.Slot{}, seal.Errorf(seal.CauseNoSlot, "configure "+kind+", and run kleidi slot add "+kind, "%s is not configured on this node", kind)
	}
	slot, err := w.Wrap(ctx, kek)
	if err == nil {
		err = rotation.Prove(ctx, kek, []seal.Slot{slot}, []seal.Wrapper{w})
	}
	return slot, err
}

// turn rotates a keyring in the slots that it has, but for those to skip; breaks is as
// in sealsAlone.
func (n *node) turn(ctx context.Context, k *keyring.Keyring, breaks bool, skip ...string) ([]*keyring.Keyring, error) {
	if full(k) {
		return nil, seal.Errorf(seal.CauseStore, "keep this keyring; it goes on serving, and recover and reseal go on working (see docs/operations.md)",
			"the keyring holds %d retired KEKs, and no more fit", keyring.MaxRetired)
	}
	wrap, err := n.wrapAll(ctx, k, skip, breaks)
	if err != nil {
		return nil, err
	}
	return rotation.Rotate(ctx, n.mem, k, wrap, n.wrappers(), time.Now())
}

// verify proves the stored keyring: it opens with a slot, its MAC verifies and
// the anchor agrees. Nothing is changed.
func (n *node) verify(ctx context.Context, _ admin.VerifyRequest) (admin.KeyringState, error) {
	k, err := n.unlocker.Open(ctx)
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("verify: %w", err)
	}
	defer k.Close()
	return admin.KeyringState{CurrentKeyID: k.CurrentID(), Revision: k.Revision(), Changes: []string{
		"the stored keyring opens, its MAC verifies and the anchor agrees",
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
