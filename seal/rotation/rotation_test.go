package rotation_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/seal/sealtest"
)

var (
	ctx = context.Background()
	now = time.Unix(1_790_000_000, 0)
	mem = seal.Memory{}
)

// wrapper is a wrapper whose slots hold the KEK in plain, and that fails on demand.
type wrapper struct {
	name               string
	wrapErr, unwrapErr error
	swapped            *seal.Secret // if set, Unwrap returns a copy of it
	wraps              []string     // the texts of the slots given to WrapLike
}

type slotData struct {
	KEK  []byte `json:"kek"`
	Text string `json:"text"`
}

func (w *wrapper) Type() string { return w.name }

func (w *wrapper) Wrap(_ context.Context, kek *seal.Secret) (seal.Slot, error) {
	return w.slot(kek, ""), w.wrapErr
}

func (w *wrapper) slot(kek *seal.Secret, text string) (s seal.Slot) {
	kek.With(func(b []byte) {
		data, err := json.Marshal(slotData{bytes.Clone(b), text})
		if err != nil {
			panic(err)
		}
		s = seal.Slot{Type: w.name, Data: data}
	})
	return s
}

func (w *wrapper) WrapLike(_ context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error) {
	if like.Type != w.name {
		return seal.Slot{}, seal.ErrNotMine
	}
	text := textOf(like)
	w.wraps = append(w.wraps, text)
	return w.slot(kek, text), w.wrapErr
}

func (w *wrapper) Unwrap(_ context.Context, s seal.Slot) (*seal.Secret, error) {
	if s.Type != w.name {
		return nil, seal.ErrNotMine
	}
	if w.unwrapErr != nil {
		return nil, w.unwrapErr
	}
	var d slotData
	if err := json.Unmarshal(s.Data, &d); err != nil {
		return nil, err
	}
	if w.swapped != nil {
		w.swapped.With(func(b []byte) { d.KEK = bytes.Clone(b) })
	}
	return mem.Take(d.KEK)
}

func textOf(s seal.Slot) string {
	var d slotData
	_ = json.Unmarshal(s.Data, &d)
	return d.Text
}

func newKEK(t testing.TB) *seal.Secret {
	t.Helper()
	kek, err := mem.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kek.Close() })
	return kek
}

func newKeyring(t testing.TB, kek *seal.Secret, slots ...seal.Slot) *keyring.Keyring {
	t.Helper()
	k, err := keyring.New(seal.ClusterID{1}, kek, slots, nil, now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return k
}

func openers(ws ...*wrapper) (out []seal.Wrapper) {
	for _, w := range ws {
		out = append(out, w)
	}
	return out
}

func rewrappers(ws ...*wrapper) (out []rotation.Rewrapper) {
	for _, w := range ws {
		out = append(out, w)
	}
	return out
}

// TestRotate: a rotation gives two revisions, which open with the same wrappers. The
// fresh KEK has as many slots as the former one.
func TestRotate(t *testing.T) {
	a, b := &wrapper{name: "tpm"}, &wrapper{name: "recovery"}
	kek := newKEK(t)
	k := newKeyring(t, kek, a.slot(kek, "one"), b.slot(kek, "two"), a.slot(kek, "three"))
	seed, id, err := k.Encrypt([]byte("a DEK seed"))
	if err != nil {
		t.Fatal(err)
	}
	revisions, err := rotation.Rotate(ctx, mem, k, rotation.Like(rewrappers(a, b), k.Slots()), openers(a), now)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range revisions {
		defer r.Close()
	}
	staged, active := revisions[0], revisions[1]
	if staged.CurrentID() != id || staged.Revision() != 2 || active.CurrentID() == id || active.Revision() != 3 || len(revisions) != 2 {
		t.Errorf("revisions %d and %d, current %s and %s", staged.Revision(), active.Revision(), staged.CurrentID(), active.CurrentID())
	}
	var texts []string
	for _, s := range active.Slots() {
		texts = append(texts, s.Type+" "+textOf(s))
	}
	if want := []string{"tpm one", "recovery two", "tpm three"}; !slices.Equal(texts, want) {
		t.Errorf("slots %q, want %q", texts, want)
	}
	if got, err := active.Decrypt(id, seed); err != nil || string(got) != "a DEK seed" {
		t.Errorf("the former KEK decrypts %q, %v", got, err)
	}
	if k.CurrentID() != id || k.Revision() != 1 {
		t.Error("the keyring that was rotated has changed")
	}
	for _, r := range revisions {
		reopen(t, r, a)
	}
}

// reopen opens the stored form of k with its first slot, which w made.
func reopen(t testing.TB, k *keyring.Keyring, w *wrapper) *keyring.Keyring {
	t.Helper()
	u, err := keyring.Parse(k.Marshal())
	if err != nil {
		t.Fatal(err)
	}
	kek, err := w.Unwrap(ctx, u.Slots()[0])
	if err != nil {
		t.Fatal(err)
	}
	opened, err := u.Open(kek, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(opened.Close)
	return opened
}

// TestRotateRefuses: a rotation fails if a slot can't be made or does not open.
func TestRotateRefuses(t *testing.T) {
	for _, test := range []struct {
		name   string
		damage func(t *testing.T, a, b *wrapper)
		says   string
		cause  seal.Cause
	}{
		{"a slot does not open", func(_ *testing.T, a, _ *wrapper) { a.unwrapErr = seal.Errorf(seal.CauseSlotCorrupt, "x", "bad") }, "new tpm slot does not open, nothing was changed", seal.CauseSlotCorrupt},
		{"a slot holds another KEK", func(t *testing.T, a, _ *wrapper) { a.swapped = newKEK(t) }, "another KEK", seal.CauseSlotCorrupt},
		{"a slot can't be made", func(_ *testing.T, _, b *wrapper) { b.wrapErr = seal.Errorf(seal.CauseUnavailable, "x", "down") }, "wrap the new KEK for the recovery slot: down", seal.CauseUnavailable},
		{"no wrapper follows a slot", func(_ *testing.T, _, b *wrapper) { b.name = "vault" }, "wrap the new KEK for the recovery slot: no configured wrapper made it", seal.CauseNoSlot},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, b := &wrapper{name: "tpm"}, &wrapper{name: "recovery"}
			kek := newKEK(t)
			k := newKeyring(t, kek, a.slot(kek, ""), b.slot(kek, ""))
			before := k.Marshal()
			test.damage(t, a, b)
			revisions, err := rotation.Rotate(ctx, mem, k, rotation.Like(rewrappers(a, b), k.Slots()), openers(a), now)
			if err == nil || !strings.Contains(err.Error(), test.says) || seal.CauseOf(err) != test.cause || revisions != nil {
				t.Errorf("%v (%d revisions); want %q", err, len(revisions), test.says)
			}
			if !bytes.Equal(k.Marshal(), before) {
				t.Error("the keyring has changed")
			}
		})
	}
}

// TestRotateWhileBootedOtherwise: a slot for another boot state can't be tried now. A
// rotation succeeds without trying it.
func TestRotateWhileBootedOtherwise(t *testing.T) {
	a := &wrapper{name: "tpm", unwrapErr: seal.Errorf(seal.CauseBootState, "x", "other PCRs")}
	kek := newKEK(t)
	k := newKeyring(t, kek, a.slot(kek, ""))
	revisions, err := rotation.Rotate(ctx, mem, k, rotation.Like(rewrappers(a), k.Slots()), openers(a), now)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range revisions {
		r.Close()
	}
	// A slot for the present boot state must open.
	err = rotation.Prove(ctx, kek, k.Slots(), openers(a))
	if seal.CauseOf(err) != seal.CauseBootState {
		t.Errorf("Prove: %v", err)
	}
}

func TestProve(t *testing.T) {
	a, b := &wrapper{name: "tpm"}, &wrapper{name: "recovery"}
	kek, other := newKEK(t), newKEK(t)
	if err := rotation.Prove(ctx, kek, []seal.Slot{a.slot(kek, ""), b.slot(kek, "")}, openers(a, b)); err != nil {
		t.Error(err)
	}
	// A slot that no opener made was not opened, so it is not proven.
	if err := rotation.Prove(ctx, kek, []seal.Slot{a.slot(kek, ""), b.slot(kek, "")}, openers(a)); !errors.Is(err, seal.ErrNotMine) {
		t.Errorf("a slot that nobody opened: %v", err)
	}
	if err := rotation.Prove(ctx, kek, []seal.Slot{a.slot(kek, "")}, nil); !errors.Is(err, seal.ErrNotMine) {
		t.Errorf("no opener at all: %v", err)
	}
	for name, slots := range map[string][]seal.Slot{
		"first": {a.slot(other, ""), b.slot(kek, "")}, "second": {a.slot(kek, ""), b.slot(other, "")},
	} {
		if err := rotation.Prove(ctx, kek, slots, openers(a, b)); seal.CauseOf(err) != seal.CauseSlotCorrupt {
			t.Errorf("the %s slot holds another KEK: %v", name, err)
		}
	}
	a.unwrapErr = errors.New("no answer")
	if err := rotation.Prove(ctx, kek, []seal.Slot{a.slot(kek, "")}, openers(a)); !errors.Is(err, a.unwrapErr) {
		t.Error(err)
	}
}

// stagedKeyring returns the keyring that a rotation leaves if it ends after its first
// revision.
func stagedKeyring(t *testing.T, a *wrapper) (k *keyring.Keyring, fresh seal.KeyID) {
	t.Helper()
	kek := newKEK(t)
	revisions, err := rotation.Rotate(ctx, mem, newKeyring(t, kek, a.slot(kek, "")), rotation.Like(rewrappers(a), []seal.Slot{a.slot(kek, "")}), openers(a), now)
	if err != nil {
		t.Fatal(err)
	}
	defer revisions[0].Close()
	defer revisions[1].Close()
	return reopen(t, revisions[0], a), revisions[1].CurrentID()
}

func TestComplete(t *testing.T) {
	a := &wrapper{name: "tpm"}
	k, fresh := stagedKeyring(t, a)
	done, err := rotation.Complete(ctx, k, openers(a), now)
	if err != nil {
		t.Fatal(err)
	}
	defer done.Close()
	if done.CurrentID() != fresh || !done.Holds(k.CurrentID()) || done.Info().Staged != nil {
		t.Errorf("current %s, want %s", done.CurrentID(), fresh)
	}
	again, err := rotation.Complete(ctx, done, openers(a), now)
	if err != nil || again != done {
		t.Errorf("nothing is staged: %v", err)
	}
}

// TestCompleteOfWhatDoesNotOpen: a staged KEK that does not open is an error. It is not
// forgotten, and no other KEK replaces it. A keyring whose staged slots no opener made
// stays unchanged.
func TestCompleteOfWhatDoesNotOpen(t *testing.T) {
	a, other := &wrapper{name: "tpm"}, &wrapper{name: "vault"}
	k, fresh := stagedKeyring(t, a)
	if same, err := rotation.Complete(ctx, k, openers(other), now); err != nil || same != k {
		t.Errorf("no opener made the staged slot: %v", err)
	}
	stranger := newKEK(t)
	for name, test := range map[string]struct {
		damage func()
		cause  seal.Cause
		says   string
	}{
		"the TPM is away":                  {func() { a.unwrapErr = seal.Errorf(seal.CauseUnavailable, "x", "no answer") }, seal.CauseUnavailable, "the staged KEK does not open: no answer"},
		"the staged slot holds a stranger": {func() { a.swapped = stranger }, seal.CauseSlotCorrupt, "but the staged KEK has key ID " + string(fresh)},
	} {
		a.unwrapErr, a.swapped = nil, nil
		test.damage()
		sealtest.NoSecretLeft(t, func() {
			done, err := rotation.Complete(ctx, k, openers(other, a), now)
			if done != nil || seal.CauseOf(err) != test.cause || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	a.unwrapErr, a.swapped = nil, nil
	sealtest.NoSecretLeft(t, func() {
		done, err := rotation.Complete(ctx, k, openers(other, a), now)
		if err != nil {
			t.Fatal(err)
		}
		if done.CurrentID() != fresh {
			t.Errorf("current %s, want %s", done.CurrentID(), fresh)
		}
		done.Close()
	})
}

// TestNoKEKIsLeft: the caller closes the keyrings that it gets, and nothing else stays
// open, whether a rotation succeeds or fails.
func TestNoKEKIsLeft(t *testing.T) {
	a := &wrapper{name: "tpm"}
	kek := newKEK(t)
	k := newKeyring(t, kek, a.slot(kek, ""))
	full := func() *keyring.Keyring { // has no room for another retired KEK
		k := k
		for range keyring.MaxRetired {
			next := newKEK(t)
			staged, err := k.Stage(next, []seal.Slot{a.slot(next, "")}, now)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(staged.Close)
			if k, err = staged.Activate(now); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(k.Close)
		}
		return k
	}()
	for name, test := range map[string]struct {
		k      *keyring.Keyring
		damage func()
	}{
		"it succeeds":            {k, func() {}},
		"a slot does not open":   {k, func() { a.unwrapErr = errors.New("no answer") }},
		"a slot can't be made":   {k, func() { a.wrapErr = errors.New("no answer") }},
		"the keyring is full":    {full, func() {}},
		"a slot opens otherwise": {k, func() { a.swapped = kek }},
	} {
		a.unwrapErr, a.wrapErr, a.swapped = nil, nil, nil
		test.damage()
		sealtest.NoSecretLeft(t, func() {
			revisions, err := rotation.Rotate(ctx, mem, test.k, rotation.Like(rewrappers(a), test.k.Slots()), openers(a), now)
			if (err == nil) != (name == "it succeeds") {
				t.Errorf("%s: %v", name, err)
			}
			for _, r := range revisions {
				r.Close()
			}
		})
		if t.Failed() {
			t.Fatal(name)
		}
	}
}
