package both_test

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
	"github.com/beezy-dev/kleidi/seal/sealtest"
)

// box is a wrapper that keeps shares in memory. Its slots hold the number of a share.
type box struct {
	mu   sync.Mutex
	kind string
	mem  seal.Memory
	kept map[string][]byte
	down error
}

func newBox(kind string) *box { return &box{kind: kind, kept: map[string][]byte{}} }

func (b *box) Type() string { return b.kind }

// fails is the error of a box that is down, or whose caller has cancelled.
func (b *box) fails(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return seal.Errorf(seal.CauseUnavailable, "hint", "box: %w", err)
	}
	return b.down
}

func (b *box) Wrap(ctx context.Context, kek *seal.Secret) (seal.Slot, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.fails(ctx); err != nil {
		return seal.Slot{}, err
	}
	data, _ := json.Marshal(map[string]int{"number": len(b.kept)})
	kek.With(func(k []byte) { b.kept[string(data)] = append([]byte(nil), k...) })
	return seal.Slot{Type: b.kind, Data: data}, nil
}

func (b *box) WrapLike(ctx context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error) {
	if like.Type != b.kind {
		return seal.Slot{}, seal.ErrNotMine
	}
	return b.Wrap(ctx, kek)
}

func (b *box) Unwrap(ctx context.Context, s seal.Slot) (*seal.Secret, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch k := b.kept[string(s.Data)]; {
	case s.Type != b.kind:
		return nil, seal.ErrNotMine
	case b.fails(ctx) != nil:
		return nil, b.fails(ctx)
	case k == nil:
		return nil, seal.Errorf(seal.CauseSlotCorrupt, "hint", "no such number")
	default:
		return b.mem.Take(append([]byte(nil), k...))
	}
}

func newBoth(t *testing.T) (w *both.Wrapper, first, second *box, kek *seal.Secret) {
	t.Helper()
	first, second = newBox("one"), newBox("two")
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kek.Close() })
	return &both.Wrapper{Kind: "one-two", Node: "alpha", First: first, Second: second}, first, second, kek
}

func mustOpen(t *testing.T, w seal.Wrapper, s seal.Slot, kek *seal.Secret) {
	t.Helper()
	got, err := w.Unwrap(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !got.Equal(kek) {
		t.Error("it opens to another KEK")
	}
}

func TestConformance(t *testing.T) {
	sealtest.Run(t, func(t *testing.T) sealtest.Harness {
		w, _, _, _ := newBoth(t)
		other, _, _, _ := newBoth(t)
		other.Node = "beta"
		return sealtest.Harness{Wrapper: w, Other: other}
	})
}

// TestNoShareIsLeft: every share is closed, whether a call succeeds or fails.
func TestNoShareIsLeft(t *testing.T) {
	w, first, second, kek := newBoth(t)
	slot, err := w.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	down := seal.Errorf(seal.CauseUnavailable, "hint", "down")
	for name, spoil := range map[string]func(){
		"nothing fails":      func() {},
		"the first is down":  func() { first.down = down },
		"the second is down": func() { second.down = down },
	} {
		sealtest.NoSecretLeft(t, func() {
			spoil()
			_, _ = w.Wrap(t.Context(), kek)
			_, _ = w.WrapLike(t.Context(), kek, slot)
			if got, err := w.Unwrap(t.Context(), slot); err == nil {
				got.Close()
			}
			_ = w.Holds(t.Context(), kek, slot)
		})
		first.down, second.down = nil, nil
		if t.Failed() {
			t.Fatal(name)
		}
	}
}

// TestSizeOfASlot: two parts that are too large for one slot are neither wrapped nor
// unwrapped.
func TestSizeOfASlot(t *testing.T) {
	w, _, _, kek := newBoth(t)
	large := seal.Slot{Type: "one", Data: []byte(`"` + strings.Repeat("x", seal.MaxSlotData/2) + `"`)}
	part := func(context.Context, *seal.Secret) (seal.Slot, error) { return large, nil }
	slot, err := w.WrapWith(t.Context(), kek, part, part)
	if err == nil {
		t.Error("it is wrapped")
	}
	slot.Type, slot.Node = w.Kind, w.Node
	if _, err := w.Unwrap(t.Context(), slot); seal.CauseOf(err) != seal.CauseSlotCorrupt || !strings.Contains(err.Error(), "at most") {
		t.Errorf("unwrapped: %v", err)
	}
}

// TestTwoOfTwo: the two wrappers open a slot together, and a share alone is not the KEK.
func TestTwoOfTwo(t *testing.T) {
	w, first, second, kek := newBoth(t)
	slot, err := w.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	again, err := w.WrapLike(t.Context(), kek, slot)
	if err != nil {
		t.Fatal(err)
	}
	if slot.Type != "one-two" || slot.Node != "alpha" {
		t.Errorf("%+v", slot)
	}
	mustOpen(t, w, slot, kek)
	mustOpen(t, w, again, kek)
	seen := map[string]bool{}
	for _, b := range []*box{first, second} {
		for _, share := range b.kept {
			kek.With(func(k []byte) {
				if string(share) == string(k) {
					t.Error("a share is the KEK")
				}
			})
			if seen[string(share)] {
				t.Error("a share was used twice")
			}
			seen[string(share)] = true
		}
	}
	for _, b := range []*box{first, second} {
		b.down = seal.Errorf(seal.CauseUnavailable, "hint", "%s is down", b.kind)
		if _, err := w.Unwrap(t.Context(), slot); !errors.Is(err, b.down) {
			t.Errorf("without %s: %v", b.kind, err)
		}
		if _, err := w.Wrap(t.Context(), kek); !errors.Is(err, b.down) {
			t.Errorf("wrapping without %s: %v", b.kind, err)
		}
		b.down = nil
	}
	mustOpen(t, w, slot, kek)
}

// TestForeignHalf: the error names the part that the configured wrapper does not know.
func TestForeignHalf(t *testing.T) {
	w, first, second, kek := newBoth(t)
	slot, err := w.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range []*box{first, second} {
		kind := b.kind
		b.kind = "other"
		for operation, try := range map[string]func() error{
			"Unwrap":   func() error { _, err := w.Unwrap(t.Context(), slot); return err },
			"WrapLike": func() error { _, err := w.WrapLike(t.Context(), kek, slot); return err },
		} {
			err := try()
			if errors.Is(err, seal.ErrNotMine) || seal.CauseOf(err) != seal.CauseNoSlot || !strings.Contains(err.Error(), "one-two: the other part is for another") {
				t.Errorf("%s without %s: %v", operation, kind, err)
			}
		}
		b.kind = kind
	}
	mustOpen(t, w, slot, kek)
}

// TestSwappedParts: a share of one KEK and a share of another give neither KEK.
func TestSwappedParts(t *testing.T) {
	w, _, _, kek := newBoth(t)
	_, _, _, other := newBoth(t)
	a, err := w.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	b, err := w.Wrap(t.Context(), other)
	if err != nil {
		t.Fatal(err)
	}
	first, _, err := both.Parts(a)
	if err != nil {
		t.Fatal(err)
	}
	_, second, err := both.Parts(b)
	if err != nil {
		t.Fatal(err)
	}
	mixed, err := w.WrapWith(t.Context(), kek,
		func(context.Context, *seal.Secret) (seal.Slot, error) { return first, nil },
		func(context.Context, *seal.Secret) (seal.Slot, error) { return second, nil })
	if err != nil {
		t.Fatal(err)
	}
	got, err := w.Unwrap(t.Context(), mixed)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if got.Equal(kek) || got.Equal(other) {
		t.Error("shares of two KEKs make one of them")
	}
}

// TestHostileSlots: malformed slots are refused as damaged, and slots of another type
// or node as not ours.
func TestHostileSlots(t *testing.T) {
	w, _, _, kek := newBoth(t)
	good, err := w.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{
		"nothing": "", "no JSON": "x", "another form": strings.Replace(string(good.Data), "both-v1", "both-v2", 1),
		"unknown member": strings.Replace(string(good.Data), `{"form"`, `{"more":1,"form"`, 1), "huge": `{"form":"` + strings.Repeat("x", seal.MaxSlotData) + `"}`,
	} {
		bad := good
		bad.Data = json.RawMessage(data)
		if _, err := w.Unwrap(t.Context(), bad); seal.CauseOf(err) != seal.CauseSlotCorrupt {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, s := range []seal.Slot{{Type: "one", Node: "alpha", Data: good.Data}, {Type: good.Type, Node: "beta", Data: good.Data}} {
		if _, err := w.Unwrap(t.Context(), s); !errors.Is(err, seal.ErrNotMine) {
			t.Errorf("%s of %s: %v", s.Type, s.Node, err)
		}
		if _, err := w.WrapLike(t.Context(), kek, s); !errors.Is(err, seal.ErrNotMine) {
			t.Errorf("%s of %s: %v", s.Type, s.Node, err)
		}
	}
	kek.Close()
	if _, err := w.Wrap(t.Context(), kek); err == nil {
		t.Error("a closed KEK is wrapped")
	}
}

// TestHolds: the second wrapper must open its part. The two shares must give the KEK if
// the first wrapper opens its part too.
func TestHolds(t *testing.T) {
	w, first, second, kek := newBoth(t)
	slot, err := w.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	down := seal.Errorf(seal.CauseBootState, "hint", "another boot state")
	for _, test := range []struct {
		name  string
		spoil func()
		cause seal.Cause
	}{
		{"both open", func() {}, ""},
		{"another boot state", func() { first.down = down }, ""},
		{"another key", func() { second.kept = map[string][]byte{} }, seal.CauseSlotCorrupt},
		{"another key, in another boot state", func() { first.down, second.kept = down, map[string][]byte{} }, seal.CauseSlotCorrupt},
		{"it is down", func() { second.down = seal.Errorf(seal.CauseUnavailable, "hint", "down") }, seal.CauseUnavailable},
		{"it lies", func() { second.kept = map[string][]byte{`{"number":0}`: make([]byte, seal.KEKSize)} }, seal.CauseSlotCorrupt},
		{"the half is another's", func() { second.kind = "three" }, seal.CauseNoSlot},
	} {
		t.Run(test.name, func(t *testing.T) {
			kind, kept, down := second.kind, second.kept, [2]error{first.down, second.down}
			defer func() { second.kind, second.kept, first.down, second.down = kind, kept, down[0], down[1] }()
			test.spoil()
			if err := w.Holds(t.Context(), kek, slot); seal.CauseOf(err) != test.cause || (err == nil) != (test.cause == "") {
				t.Errorf("%v; want cause %q", err, test.cause)
			}
		})
	}
	for _, s := range []seal.Slot{{Type: "two", Node: slot.Node, Data: slot.Data}, {Type: slot.Type, Node: "beta", Data: slot.Data}} {
		if err := w.Holds(t.Context(), kek, s); !errors.Is(err, seal.ErrNotMine) {
			t.Errorf("a slot of %s, %s: %v", s.Type, s.Node, err)
		}
	}
}
