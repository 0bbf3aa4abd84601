package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/tpm"
)

// A token, or a key of a server, is found by its name, and another one can have the
// same: one that was put in its place, or a key that was deleted and made anew. Who has
// that one must not be given the KEK. So what makes a slot anew first has the wrapper
// open the one that is there, which shows that its key is the same.

const hintSameKey = "bring back the token, or the server, whose key made the slot"

// otherKeyError says that the configured token or server may hold another key than the
// one that made the slot: only the operator can tell whether it is to be trusted.
type otherKeyError struct{ error }

// Unwrap returns the reason.
func (e *otherKeyError) Unwrap() error { return e.error }

// backed reports whether a token or a server opens slots of a type, alone or together
// with the TPM.
func backed(kind string) bool {
	return kind == seal.TypePKCS11 || kind == seal.TypeVault || twoOfTwo(kind) != ""
}

// holds has a wrapper show that it has the key of a slot that holds kek.
func holds(ctx context.Context, w seal.Wrapper, kek *seal.Secret, s seal.Slot) error {
	if pair, ok := w.(*both.Wrapper); ok {
		return pair.Holds(ctx, kek, s)
	}
	got, err := w.Unwrap(ctx, s)
	if errors.Is(err, seal.ErrNotMine) {
		return seal.Errorf(seal.CauseNoSlot, hintSameKey, "the token, or the server, that is configured did not make it")
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

// strangers are the tokens and servers that are not to get the KEK although they are
// configured: they don't open the slot that is there, or were left out.
func (n *node) strangers(ctx context.Context, k *keyring.Keyring) map[string]error {
	all := map[string]error{}
	for _, s := range k.Slots() {
		kind := typeName(s)
		w := n.wrapper(kind)
		if kind != seal.TypePKCS11 && kind != seal.TypeVault || w == nil {
			continue
		}
		if d, ok := skippedBy(s); ok {
			all[kind] = n.missing(d, k.Slots())
		} else if err := holds(ctx, w, k.KEK(), s); err != nil {
			all[kind] = n.otherKey(k, s, err)
		}
	}
	return all
}

// notAnother refuses to put a slot in the place of one that the wrapper doesn't open.
func (n *node) notAnother(ctx context.Context, k *keyring.Keyring, w seal.Wrapper) error {
	for _, s := range k.Slots() {
		if s.Type != w.Type() || !backed(s.Type) {
			continue
		}
		if err := holds(ctx, w, k.KEK(), s); err != nil {
			return n.otherKey(k, s, err)
		}
	}
	return nil
}

// proven follows slots of a keyring with the wrapper that opens them alone.
type proven struct {
	rotation.Rewrapper
	node *node
	open *keyring.Keyring
}

// WrapLike implements rotation.Rewrapper.
func (p proven) WrapLike(ctx context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error) {
	if w, ok := p.Rewrapper.(seal.Wrapper); ok && backed(like.Type) && w.Type() == like.Type {
		if err := holds(ctx, w, p.open.KEK(), like); err != nil {
			return seal.Slot{}, p.node.otherKey(p.open, like, err)
		}
	}
	return p.Rewrapper.WrapLike(ctx, kek, like)
}

// proven are the wrappers that make the slots of an open keyring anew.
func (n *node) proven(k *keyring.Keyring) []rotation.Rewrapper {
	all := n.rewrappers()
	for i, w := range all {
		all[i] = proven{w, n, k}
	}
	return all
}

// otherKey says what to do where the reason may be that the key is another one.
func (n *node) otherKey(k *keyring.Keyring, s seal.Slot, err error) error {
	if cause := seal.CauseOf(err); cause != seal.CauseSlotCorrupt && cause != seal.CauseNoSlot {
		return err
	}
	return &otherKeyError{fmt.Errorf("its key may be another one, since it does not open the present slot: %w",
		seal.WithHint(err, hintSameKey+"; if its key was made anew, and you trust it, run kleidi slot rewrap "+n.nameOf(k, s)+" --new-key"))}
}

// nameOf is the name of a slot of a keyring.
func (n *node) nameOf(k *keyring.Keyring, s seal.Slot) string {
	slots := k.Slots()
	for i, name := range slotNames(slots) {
		if identity(slots[i]) == identity(s) {
			return name
		}
	}
	return s.Type
}

// sameKey refuses to make the TPM's half of a two-of-two anew while the second wrapper
// does not open its own half of the slot that is there.
func (n *node) sameKey(ctx context.Context, k *keyring.Keyring) error {
	kind := n.needsBoth()
	own := slices.DeleteFunc(k.Slots(), func(s seal.Slot) bool { return s.Type != kind || s.Node != n.cfg.Node })
	if kind == "" || len(own) == 0 {
		return nil
	}
	// All have the same key, but where one was rewrapped by another: that of the present
	// boot state says which counts.
	at := max(slices.IndexFunc(own, func(s seal.Slot) bool { return n.use(s) == uses[tpm.UsePresent] }), 0)
	if err := n.together(kind, n.tpm).Holds(ctx, k.KEK(), own[at]); err != nil {
		return n.otherKey(k, own[at], err)
	}
	return nil
}

// withSkipHint adds to a refusal of a rotation that it can do without the slot, and how
// the command is told so.
func (n *node) withSkipHint(k *keyring.Keyring, err error, how string) error {
	e, ok := errors.AsType[*rotation.SlotError](err)
	if !ok {
		return err
	}
	rest := slices.DeleteFunc(k.Slots(), func(s seal.Slot) bool { return identity(s) == identity(e.Slot) })
	if !n.anyOpens(rest) {
		return err
	}
	return seal.AddHint(err, "to go on without the slot for now, "+how+" --skip-slot "+n.nameOf(k, e.Slot))
}

// withIdentityHint is for a keyring that is to come back, and is not open yet.
func withIdentityHint(err error) error {
	if _, ok := errors.AsType[*otherKeyError](err); !ok {
		return err
	}
	return seal.WithHint(err, hintSameKey+"; or restore with --identity-file, which trusts the one that is there")
}

// rewrapByNewKey wraps the KEK by the key that is configured now, in the place of a
// slot that another one may have made.
func (n *node) rewrapByNewKey(ctx context.Context, k *keyring.Keyring, s seal.Slot) (seal.Slot, error) {
	w := n.wrapper(s.Type)
	if !backed(s.Type) || w == nil {
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
