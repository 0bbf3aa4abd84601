// Package both needs two wrappers to open a KEK: two of two.
//
// The KEK is split into two shares, each of which alone says nothing: a random
// one, and the KEK exclusive-or that one. Each is wrapped by a wrapper of its own,
// and the slot holds both.
package both

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"

	kjson "sigs.k8s.io/json"

	"github.com/beezy-dev/kleidi/seal"
)

// form is the version of slotData.
const form = "both-v1"

// slotData is the JSON in Slot.Data. All of it is untrusted: each part is read by
// its own wrapper.
type slotData struct {
	Form  string  `json:"form"`
	Parts [2]part `json:"parts"`
}

type part struct {
	Type string          `json:"type"`
	Node string          `json:"node,omitempty"`
	Data json.RawMessage `json:"data"`
}

// Part is a wrapper that can also wrap as an authenticated slot is wrapped.
type Part interface {
	seal.Wrapper
	WrapLike(ctx context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error)
}

// Wrapper wraps by both of two wrappers. It implements [seal.Wrapper].
type Wrapper struct {
	// Kind is the type of its slots.
	Kind string
	// Node is the node of its slots, where one of the wrappers is bound to one.
	Node          string
	First, Second Part
	Memory        seal.Memory
}

// Type implements [seal.Wrapper].
func (w *Wrapper) Type() string { return w.Kind }

// Wrap implements [seal.Wrapper].
func (w *Wrapper) Wrap(ctx context.Context, kek *seal.Secret) (seal.Slot, error) {
	return w.WrapWith(ctx, kek, w.First.Wrap, w.Second.Wrap)
}

// WrapLike wraps kek as both parts of an authenticated slot are wrapped.
func (w *Wrapper) WrapLike(ctx context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error) {
	if like.Type != w.Kind || like.Node != w.Node {
		return seal.Slot{}, seal.ErrNotMine
	}
	first, second, err := Parts(like)
	if err != nil {
		return seal.Slot{}, err
	}
	return w.WrapWith(ctx, kek,
		func(ctx context.Context, s *seal.Secret) (seal.Slot, error) {
			slot, err := w.First.WrapLike(ctx, s, first)
			return slot, w.half(w.First, err)
		},
		func(ctx context.Context, s *seal.Secret) (seal.Slot, error) {
			slot, err := w.Second.WrapLike(ctx, s, second)
			return slot, w.half(w.Second, err)
		})
}

// Wrap wraps one share.
type Wrap func(ctx context.Context, share *seal.Secret) (seal.Slot, error)

// WrapWith splits kek and has each share wrapped.
func (w *Wrapper) WrapWith(ctx context.Context, kek *seal.Secret, first, second Wrap) (seal.Slot, error) {
	random := make([]byte, seal.KEKSize)
	rand.Read(random)
	share, err := w.Memory.Take(random)
	if err != nil {
		return seal.Slot{}, err
	}
	defer share.Close()
	rest, err := w.xor(kek, share)
	if err != nil {
		return seal.Slot{}, err
	}
	defer rest.Close()
	a, err := first(ctx, share)
	if err != nil {
		return seal.Slot{}, err
	}
	b, err := second(ctx, rest)
	if err != nil {
		return seal.Slot{}, err
	}
	data, err := json.Marshal(slotData{form, [2]part{{a.Type, a.Node, a.Data}, {b.Type, b.Node, b.Data}}})
	if err == nil && len(data) > seal.MaxSlotData {
		err = fmt.Errorf("both parts have %d bytes, at most %d fit", len(data), seal.MaxSlotData)
	}
	return seal.Slot{Type: w.Kind, Node: w.Node, Data: data}, err
}

// xor returns a new secret, a exclusive-or b.
func (w *Wrapper) xor(a, b *seal.Secret) (*seal.Secret, error) {
	out := make([]byte, seal.KEKSize)
	sizes := 0
	a.With(func(x []byte) {
		b.With(func(y []byte) {
			if sizes = len(x) + len(y); sizes == 2*seal.KEKSize {
				subtle.XORBytes(out, x, y)
			}
		})
	})
	if sizes != 2*seal.KEKSize {
		clear(out)
		return nil, errors.New("no KEK to split: it is closed or of another size")
	}
	return w.Memory.Take(out)
}

// Unwrap implements [seal.Wrapper]. Both wrappers are needed; the first to refuse
// says why.
func (w *Wrapper) Unwrap(ctx context.Context, slot seal.Slot) (*seal.Secret, error) {
	if slot.Type != w.Kind || slot.Node != w.Node {
		return nil, seal.ErrNotMine
	}
	first, second, err := Parts(slot)
	if err != nil {
		return nil, err
	}
	a, err := w.First.Unwrap(ctx, first)
	if err != nil {
		return nil, w.half(w.First, err)
	}
	defer a.Close()
	b, err := w.Second.Unwrap(ctx, second)
	if err != nil {
		return nil, w.half(w.Second, err)
	}
	defer b.Close()
	return w.xor(a, b)
}

// Holds has the second wrapper open its half of an authenticated slot that holds kek:
// what answers to its name may be another one, with another key. Where the first one
// opens its half too, which it does not for another boot state, both together have to
// be kek.
func (w *Wrapper) Holds(ctx context.Context, kek *seal.Secret, slot seal.Slot) error {
	if slot.Type != w.Kind || slot.Node != w.Node {
		return seal.ErrNotMine
	}
	first, second, err := Parts(slot)
	if err != nil {
		return err
	}
	b, err := w.Second.Unwrap(ctx, second)
	if err != nil {
		return w.half(w.Second, err)
	}
	defer b.Close()
	a, err := w.First.Unwrap(ctx, first)
	if err != nil {
		return nil
	}
	defer a.Close()
	whole, err := w.xor(a, b)
	if err != nil {
		return err
	}
	defer whole.Close()
	if !whole.Equal(kek) {
		return corrupt("both parts open, and are another KEK")
	}
	return nil
}

// half says which half a wrapper does not know: the whole is this wrapper's, and no
// other one opens it.
func (w *Wrapper) half(part Part, err error) error {
	if !errors.Is(err, seal.ErrNotMine) {
		return err
	}
	return seal.Errorf(seal.CauseNoSlot, "see node and the settings of "+part.Type()+" in the configuration",
		"%s: its half of %s is for another node, token or key than the configured one", w.Kind, part.Type())
}

// Parts returns the two slots within one, as untrusted as it is.
func Parts(slot seal.Slot) (first, second seal.Slot, err error) {
	var d slotData
	if len(slot.Data) > seal.MaxSlotData {
		return first, second, corrupt("%d bytes, at most %d are read", len(slot.Data), seal.MaxSlotData)
	}
	strict, err := kjson.UnmarshalStrict(slot.Data, &d)
	if err == nil && len(strict) > 0 {
		err = strict[0]
	}
	if err != nil {
		return first, second, corrupt("%.200s", err)
	}
	if d.Form != form {
		return first, second, corrupt("form %.40q is not known to this version", d.Form)
	}
	return d.Parts[0].slot(), d.Parts[1].slot(), nil
}

func (p part) slot() seal.Slot { return seal.Slot{Type: p.Type, Node: p.Node, Data: []byte(p.Data)} }

func corrupt(format string, args ...any) error {
	return seal.Errorf(seal.CauseSlotCorrupt, "bring back an undamaged keyring with kleidi keyring restore",
		"the slot of two wrappers is damaged: "+format, args...)
}
