package node

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/tpm"
)

// HintSameKey is the hint if the configured token or server may have another key than the
// one that made a slot.
const HintSameKey = "bring back the token, or the server, whose key made the slot"

// OtherKeyError says that the configured token or server may hold a key other than the
// one that made the slot. Only the operator can decide whether to trust it.
type OtherKeyError struct{ error }

// Unwrap returns the reason.
func (e *OtherKeyError) Unwrap() error { return e.error }

// proveKey makes a wrapper show that it has the key of a slot that holds kek.
func proveKey(ctx context.Context, w seal.Wrapper, kek *seal.Secret, s seal.Slot) error {
	if pair, ok := w.(*both.Wrapper); ok {
		return pair.Holds(ctx, kek, s)
	}
	got, err := w.Unwrap(ctx, s)
	if errors.Is(err, seal.ErrNotMine) {
		return seal.Errorf(seal.CauseNoSlot, HintSameKey, "the configured token or server did not make this slot")
	}
	if err != nil {
		return err
	}
	defer got.Close()
	if !got.Equal(kek) {
		return seal.Errorf(seal.CauseSlotCorrupt, "see whether the wrapper's backend is healthy", "the present slot opens, and holds another KEK")
	}
	return nil
}

// UntrustedKeys are the configured tokens and servers that must not receive the KEK:
// they do not open the existing slot, or were left out.
func (n *Node) UntrustedKeys(ctx context.Context, k *keyring.Keyring) map[string]error {
	all := map[string]error{}
	for _, s := range k.Slots() {
		kind := slotview.TypeOf(s)
		w := n.Wrapper(kind)
		if !slotview.IsSecondary(kind) || w == nil {
			continue
		}
		if d, ok := slotview.MissingOf(s); ok {
			all[kind] = n.View.WhyMissing(d, k.Slots())
		} else if err := proveKey(ctx, w, k.KEK(), s); err != nil {
			all[kind] = n.otherKey(k, s, err)
		}
	}
	return all
}

// CheckKeyOf refuses to replace a slot that the wrapper does not open.
func (n *Node) CheckKeyOf(ctx context.Context, k *keyring.Keyring, w seal.Wrapper) error {
	for _, s := range k.Slots() {
		if s.Type != w.Type() || !slotview.HasBackend(s.Type) {
			continue
		}
		if err := proveKey(ctx, w, k.KEK(), s); err != nil {
			return n.otherKey(k, s, err)
		}
	}
	return nil
}

// provenRewrapper follows only the slots of a keyring that its wrapper opens.
type provenRewrapper struct {
	rotation.Rewrapper
	node *Node
	open *keyring.Keyring
}

// WrapLike implements rotation.Rewrapper.
func (p provenRewrapper) WrapLike(ctx context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error) {
	if w, ok := p.Rewrapper.(seal.Wrapper); ok && slotview.HasBackend(like.Type) && w.Type() == like.Type {
		if err := proveKey(ctx, w, p.open.KEK(), like); err != nil {
			return seal.Slot{}, p.node.otherKey(p.open, like, err)
		}
	}
	return p.Rewrapper.WrapLike(ctx, kek, like)
}

// ProvenRewrappers are the wrappers that make the slots of an open keyring again.
func (n *Node) ProvenRewrappers(k *keyring.Keyring) []rotation.Rewrapper {
	all := n.Rewrappers()
	for i, w := range all {
		all[i] = provenRewrapper{w, n, k}
	}
	return all
}

// otherKey says what to do if the reason may be another key.
func (n *Node) otherKey(k *keyring.Keyring, s seal.Slot, err error) error {
	if cause := seal.CauseOf(err); cause != seal.CauseSlotCorrupt && cause != seal.CauseNoSlot {
		return err
	}
	return &OtherKeyError{fmt.Errorf("its key may have been replaced, since it does not open the present slot: %w",
		seal.WithHint(err, HintSameKey+"; if its key was replaced, and you trust the new one, run kleidi slot rewrap "+slotview.NameOf(k, s)+" --new-key"))}
}

// CheckSecondKey refuses to make the TPM's half of a two-of-two again while the second
// wrapper does not open its half of the existing slot.
func (n *Node) CheckSecondKey(ctx context.Context, k *keyring.Keyring) error {
	kind := n.View.TwoOfTwo()
	own := slices.DeleteFunc(k.Slots(), func(s seal.Slot) bool { return s.Type != kind || s.Node != n.Config.Node })
	if kind == "" || len(own) == 0 {
		return nil
	}
	// All slots have the same key, unless one was rewrapped with another. The slot for
	// the present boot state says which key counts.
	at := max(slices.IndexFunc(own, func(s seal.Slot) bool { return n.View.Use(s) == slotview.UseNames[tpm.UsePresent] }), 0)
	if err := n.TwoOfTwoWrapper(kind, n.TPM).Holds(ctx, k.KEK(), own[at]); err != nil {
		return n.otherKey(k, own[at], err)
	}
	return nil
}

// HintKeyMade marks a failure after the token has generated a key: the next try must
// use that key.
func HintKeyMade(err error) error {
	return seal.AddHint(err, "the key is made, so leave --generate-key out when you run it again")
}
