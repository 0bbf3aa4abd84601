package main

import (
	"context"
	"errors"
	"slices"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/unlock"
	"github.com/beezy-dev/kleidi/tpm"
)

// Two of two: the TPM and a token, or the TPM and a server, have to open together.

// twoOfTwo is what the second wrapper of a two-of-two is, by its name in
// unlock.order; "" for others.
func twoOfTwo(kind string) string {
	switch kind {
	case seal.TypeTPMAndPKCS11:
		return seal.TypePKCS11
	case seal.TypeTPMAndVault:
		return seal.TypeVault
	}
	return ""
}

// needsBoth returns which two have to open together on this node; "" where one is
// enough.
func (n *node) needsBoth() string {
	for _, kind := range n.cfg.Unlock.Order {
		if twoOfTwo(kind) != "" {
			return kind
		}
	}
	return ""
}

// together returns the wrapper of a two-of-two over first, which is the TPM's.
func (n *node) together(kind string, first both.Part) *both.Wrapper {
	second, _ := n.wrapper(twoOfTwo(kind)).(both.Part)
	if second == nil {
		return nil
	}
	return &both.Wrapper{Kind: kind, Node: n.cfg.Node, First: first, Second: second, Memory: n.mem}
}

// ofTPM returns the slot of the TPM in a slot: the slot itself, or its half of a
// two-of-two.
func ofTPM(s seal.Slot) seal.Slot {
	if twoOfTwo(s.Type) == "" {
		return s
	}
	first, _, err := both.Parts(s)
	if err != nil {
		return seal.Slot{}
	}
	return first
}

// ofVault returns the slot of Vault in a slot: the slot itself, or its half of a
// two-of-two.
func ofVault(s seal.Slot) seal.Slot {
	if twoOfTwo(s.Type) != seal.TypeVault {
		return s
	}
	_, second, err := both.Parts(s)
	if err != nil {
		return seal.Slot{}
	}
	return second
}

// halves returns slots with the TPM's half in the place of each two-of-two: for
// the gate, the epoch and all that asks what the TPM demands.
func halves(slots []seal.Slot) []seal.Slot {
	out := slices.Clone(slots)
	for i, s := range out {
		out[i] = ofTPM(s)
	}
	return out
}

// halved is a refusal that some slots overrule, asked about the TPM's half of each.
type halved struct{ unlock.Overruled }

// Overrules implements unlock.Overruled.
func (h halved) Overrules(s seal.Slot) bool { return h.Overruled.Overrules(ofTPM(s)) }

// Unwrap returns the refusal.
func (h halved) Unwrap() error { return h.Overruled }

// isTPM reports whether a slot is one of this node's TPM, alone or with another.
func (n *node) isTPM(s seal.Slot) bool {
	return (s.Type == seal.TypeTPM || twoOfTwo(s.Type) != "") && s.Node == n.cfg.Node
}

// wrapState seals a KEK to a boot state, alone or together with the second wrapper.
func (n *node) wrapState(ctx context.Context, w *tpm.Wrapper, kek *seal.Secret, state tpm.BootState) (seal.Slot, error) {
	kind := n.needsBoth()
	if kind == "" {
		return w.WrapState(ctx, kek, state)
	}
	pair := n.together(kind, w)
	return pair.WrapWith(ctx, kek,
		func(ctx context.Context, share *seal.Secret) (seal.Slot, error) {
			return w.WrapState(ctx, share, state)
		}, pair.Second.Wrap)
}

// hasBoth reports whether one of the slots is a two-of-two, or the place of one.
func hasBoth(slots []seal.Slot) bool {
	return slices.ContainsFunc(slots, func(s seal.Slot) bool { return twoOfTwo(typeName(s)) != "" })
}

// breaks refuses a slot that one wrapper opens alone beside a two-of-two.
func (n *node) breaks(kind string, slots []seal.Slot) error {
	has := n.needsBoth() != "" || hasBoth(slots)
	if !has || twoOfTwo(kind) != "" {
		return nil
	}
	return errors.New("a slot of " + kind + " would open the KEK alone, and break two of two; if that is what you want, add --break-two-of-two")
}

// keepsBoth refuses a recovery that leaves one way in beside a two-of-two that was
// not there before, or that makes one enough where two were needed.
func (n *node) keepsBoth(old []seal.Slot) error {
	had := hasBoth(old)
	switch wants := n.needsBoth() != ""; {
	case had == wants:
		return nil
	case wants:
		return n.breaks(seal.TypeRecovery, old)
	default:
		return errors.New("the keyring needs two wrappers together, and unlock.order has one open it; set unlock.order to that two-of-two, or add --break-two-of-two")
	}
}

// sealsAlone refuses to seal to the TPM alone beside a two-of-two, or in its place:
// unlock.order may have lost it since.
func (n *node) sealsAlone(slots []seal.Slot) error {
	if n.needsBoth() != "" || !hasBoth(slots) {
		return nil
	}
	return errors.New("the keyring needs two wrappers together, and unlock.order names no two-of-two; set unlock.order to that two-of-two, or, if one is to be enough, run kleidi reseal with --break-two-of-two")
}

// broken says that the TPM alone opens what needed two together in slots.
func (n *node) broken(slots []seal.Slot) (changes []string) {
	if n.needsBoth() == "" && hasBoth(slots) {
		changes = []string{"TWO OF TWO IS BROKEN: the TPM opens the KEK alone"}
	}
	return changes
}

// freshForBoth refuses a two-of-two of a KEK that one wrapper may have held alone,
// which is what is left where there is no room to retire it.
func (n *node) freshForBoth(k *keyring.Keyring) error {
	if n.needsBoth() == "" || hasBoth(k.Slots()) || !full(k) {
		return nil
	}
	return seal.Errorf(seal.CauseStore, "set unlock.order to tpm, or to what else opened this keyring, and run the command again; it can't become two of two (see docs/operations.md)",
		"two of two wants a fresh KEK, and the keyring holds %d retired ones: no more fit", keyring.MaxRetired)
}
