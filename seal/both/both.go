// Package both implements two-of-two: a slot that opens only with two wrappers
// together.
//
// The KEK is split into two shares: a random one, and the exclusive-or of the KEK
// and the random one. A single share reveals nothing about the KEK. Each wrapper
// wraps one share, and the slot holds both wrapped shares.
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

// form names the version of slotData.
const form = "both-v1"

// slotData is the JSON in Slot.Data. It is untrusted. The wrapper of each part parses
// that part.
type slotData struct {
	Form  string  `json:"form"`
	Parts [2]part `json:"parts"`
}

type part struct {
	Type string          `json:"type"`
	Node string          `json:"node,omitempty"`
	Data json.RawMessage `json:"data"`
}

// Part is a wrapper that can also wrap a KEK in the same way as an authenticated slot.
type Part interface {
	seal.Wrapper
	WrapLike(ctx context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error)
}

// Wrapper wraps a KEK so that two wrappers are needed to unwrap it. It implements
// [seal.Wrapper].
type Wrapper struct {
	// Kind is the type of the slots.
	Kind string
	// Node is the node of the slots. It is empty if neither wrapper is bound to a node.
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

// WrapLike wraps kek in the same way as the two parts of an authenticated slot.
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
			return slot, w.partError(w.First, err)
		},
		func(ctx context.Context, s *seal.Secret) (seal.Slot, error) {
			slot, err := w.Second.WrapLike(ctx, s, second)
			return slot, w.partError(w.Second, err)
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
		return nil, errors.New("no KEK to split: it is closed or has the wrong size")
	}
	return w.Memory.Take(out)
}

// Unwrap implements [seal.Wrapper]. It needs both wrappers, and returns the error of
// the first one that fails.
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
		return nil, w.partError(w.First, err)
	}
	defer a.Close()
	b, err := w.Second.Unwrap(ctx, second)
	if err != nil {
		return nil, w.partError(w.Second, err)
	}
	defer b.Close()
	return w.xor(a, b)
}

// Holds checks that the wrappers still open an authenticated slot that holds kek. The
// second wrapper must open its part: a token or a server with another key may have
// taken its name. The first wrapper does not open its part in another boot state. If
// it does open it, the two shares must give kek.
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
		return w.partError(w.Second, err)
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
		return corrupt("both parts open, but give another KEK")
	}
	return nil
}

// partError replaces seal.ErrNotMine, the error of a part, by an error that names the
// part. The slot as a whole is this wrapper's, so no other wrapper can open it.
func (w *Wrapper) partError(part Part, err error) error {
	if !errors.Is(err, seal.ErrNotMine) {
		return err
	}
	return seal.Errorf(seal.CauseNoSlot, "see node and the settings of "+part.Type()+" in the configuration",
		"%s: the %s part is for another node, token or key than the configured one", w.Kind, part.Type())
}

// Parts returns the two slots inside a slot. They are as untrusted as that slot.
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
	return seal.Errorf(seal.CauseSlotCorrupt, "bring back an undamaged keyring with kleidi keyring restore --previous, or kleidi keyring restore BACKUP",
		"the slot of two wrappers is damaged: "+format, args...)
}
