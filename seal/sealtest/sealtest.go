// Package sealtest is the conformance suite for wrappers. It tests on the real backend
// what every [seal.Wrapper] promises.
package sealtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// Harness holds the objects under test.
type Harness struct {
	// Wrapper is the wrapper under test.
	Wrapper seal.Wrapper
	// Other is another wrapper of the same type: another identity, TPM or token.
	Other seal.Wrapper
	// OtherCause is the cause of Other's error for a slot of Wrapper. If it is empty,
	// that error is seal.ErrNotMine.
	OtherCause seal.Cause
	// Memory allocates the KEKs of the suite.
	Memory seal.Memory
	// Stride is the distance between two bytes of a slot that the suite damages. 0 and
	// 1 damage every byte; a slow backend needs more.
	Stride int
}

// callers is the number of goroutines that use a wrapper at the same time.
const callers = 8

// Run runs the suite. It calls newHarness for each subtest. A parallel test may not call
// it: the suite counts what is left in the whole process.
func Run(t *testing.T, newHarness func(t *testing.T) Harness) {
	t.Setenv("KLEIDI_SEALTEST", "alone") // panics in a parallel test
	for _, test := range []struct {
		name string
		run  func(t *testing.T, h Harness)
	}{
		{"RoundTrip", testRoundTrip},
		{"SlotHoldsNoKEK", testSlotHoldsNoKEK},
		{"WrapRefusesWhatIsNoKEK", testWrapRefusesWhatIsNoKEK},
		{"OtherTypes", testOtherTypes},
		{"OtherWrapper", testOtherWrapper},
		{"Damaged", testDamaged},
		{"Truncated", testTruncated},
		{"NoSlotData", testNoSlotData},
		{"Cancelled", testCancelled},
		{"Concurrent", testConcurrent},
		{"NothingLeft", testNothingLeft},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, newHarness(t)) })
	}
}

func (h Harness) newKEK(t *testing.T) *seal.Secret {
	t.Helper()
	kek, err := h.Memory.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kek.Close() })
	return kek
}

func (h Harness) wrap(t *testing.T, kek *seal.Secret) seal.Slot {
	t.Helper()
	slot, err := h.Wrapper.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatalf("Wrap: %v", err)
	}
	return slot
}

// testRoundTrip: a slot opens to its KEK several times, also after it was stored. Wrap
// does not change its KEK, and each Unwrap returns a Secret of its own.
func testRoundTrip(t *testing.T, h Harness) {
	kek, copied := h.newKEK(t), h.copied(t)
	kek.With(func(b []byte) { copied.With(func(c []byte) { copy(c, b) }) })
	slot := h.wrap(t, kek)
	if !kek.Equal(copied) {
		t.Fatal("Wrap changed or closed the KEK")
	}
	if slot.Type != h.Wrapper.Type() {
		t.Errorf("the slot is of type %q, the wrapper of type %q", slot.Type, h.Wrapper.Type())
	}
	stored, err := json.Marshal(slot)
	if err != nil {
		t.Fatalf("the slot can't be stored: %v", err)
	}
	var read seal.Slot
	if err := json.Unmarshal(stored, &read); err != nil {
		t.Fatal(err)
	}
	first := h.unwrap(t, read)
	second := h.unwrap(t, slot)
	if !first.Equal(kek) || !second.Equal(kek) {
		t.Fatal("Unwrap returned another KEK")
	}
	first.Close()
	if !second.Equal(kek) {
		t.Error("closing one Secret closed another")
	}
	if again := h.wrap(t, second); !h.unwrap(t, again).Equal(kek) {
		t.Error("an unwrapped KEK does not wrap again")
	}
}

func (h Harness) copied(t *testing.T) *seal.Secret {
	t.Helper()
	s, err := h.Memory.New(seal.KEKSize)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func (h Harness) unwrap(t *testing.T, slot seal.Slot) *seal.Secret {
	t.Helper()
	kek, err := h.Wrapper.Unwrap(t.Context(), slot)
	if err != nil {
		t.Fatalf("Unwrap: %v", err)
	}
	t.Cleanup(func() { kek.Close() })
	return kek
}

// testSlotHoldsNoKEK: the data of a slot is a JSON object of at most seal.MaxSlotData
// bytes, and does not hold the KEK in a common encoding.
func testSlotHoldsNoKEK(t *testing.T, h Harness) {
	kek := h.newKEK(t)
	slot := h.wrap(t, kek)
	var object map[string]json.RawMessage
	if err := json.Unmarshal(slot.Data, &object); err != nil {
		t.Errorf("the data is not a JSON object: %v", err)
	}
	if len(slot.Data) > seal.MaxSlotData {
		t.Errorf("the data has %d bytes, at most %d", len(slot.Data), seal.MaxSlotData)
	}
	text := slot.Type + "\n" + slot.Node + "\n" + string(slot.Data)
	kek.With(func(b []byte) {
		if form := FindSecret(text, b); form != "" {
			t.Errorf("the slot holds the KEK (%s)", form)
		}
	})
}

// testWrapRefusesWhatIsNoKEK: Wrap refuses a closed Secret and a Secret of another size.
func testWrapRefusesWhatIsNoKEK(t *testing.T, h Harness) {
	closed := h.newKEK(t)
	closed.Close()
	if _, err := h.Wrapper.Wrap(t.Context(), closed); err == nil {
		t.Error("Wrap takes a closed Secret")
	}
	for _, n := range []int{1, seal.KEKSize - 1, seal.KEKSize + 1} {
		s, err := h.Memory.New(n)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if _, err := h.Wrapper.Wrap(t.Context(), s); err == nil {
			t.Errorf("Wrap takes a secret of %d bytes", n)
		}
	}
}

// testOtherTypes: a slot of another type is not this wrapper's, whatever its data.
func testOtherTypes(t *testing.T, h Harness) {
	slot := h.wrap(t, h.newKEK(t))
	for _, typ := range []string{seal.TypeTPM, seal.TypePKCS11, seal.TypeVault, seal.TypeRecovery, "later", ""} {
		if typ == h.Wrapper.Type() {
			continue
		}
		slot.Type = typ
		if _, err := h.Wrapper.Unwrap(t.Context(), slot); !errors.Is(err, seal.ErrNotMine) {
			t.Errorf("a slot of type %q: %v, want ErrNotMine", typ, err)
		}
	}
}

// testOtherWrapper: another identity, TPM or token does not open the slot, and its error
// differs from that for a damaged slot.
func testOtherWrapper(t *testing.T, h Harness) {
	slot := h.wrap(t, h.newKEK(t))
	kek, err := h.Other.Unwrap(t.Context(), slot)
	if err == nil {
		kek.Close()
		t.Fatal("another wrapper opens the slot")
	}
	if h.OtherCause == "" {
		if !errors.Is(err, seal.ErrNotMine) {
			t.Errorf("%v, want ErrNotMine", err)
		}
		return
	}
	checkTyped(t, err, "a slot of another wrapper")
	if got := seal.CauseOf(err); got != h.OtherCause {
		t.Errorf("cause %q, want %q (%v)", got, h.OtherCause, err)
	}
}

// testDamaged: a slot with a flipped bit gives a typed error, or the same KEK if the bit
// belongs to a member for display. It never gives another KEK. (A malicious slot can
// hold another KEK. Only the key ID reveals that.)
func testDamaged(t *testing.T, h Harness) {
	kek := h.newKEK(t)
	slot := h.wrap(t, kek)
	for i := 0; i < len(slot.Data); i += max(h.Stride, 1) {
		damaged := slot
		damaged.Data = append(json.RawMessage(nil), slot.Data...)
		damaged.Data[i] ^= 1 << (i % 8)
		h.checkDamaged(t, damaged, kek)
	}
}

// testTruncated: a truncated slot gives a typed error.
func testTruncated(t *testing.T, h Harness) {
	kek := h.newKEK(t)
	slot := h.wrap(t, kek)
	for n := 0; n < len(slot.Data); n += 16 * max(h.Stride, 1) {
		damaged := slot
		damaged.Data = slot.Data[:n:n]
		h.checkDamaged(t, damaged, nil)
	}
}

// testNoSlotData: data that is not of the wrapper's format gives a typed error.
func testNoSlotData(t *testing.T, h Harness) {
	slot := h.wrap(t, h.newKEK(t))
	for _, data := range []string{"", "null", "{}", "[]", "1", `""`, `{"` + strings.Repeat("a", seal.MaxSlotData) + `":1}`,
		strings.Repeat("[", seal.MaxSlotData)} {
		damaged := slot
		damaged.Data = json.RawMessage(data)
		h.checkDamaged(t, damaged, nil)
	}
}

// checkDamaged wants a typed error, or the KEK same if that isn't nil.
func (h Harness) checkDamaged(t *testing.T, slot seal.Slot, same *seal.Secret) {
	t.Helper()
	kek, err := h.Wrapper.Unwrap(t.Context(), slot)
	if err != nil {
		checkTyped(t, err, "a damaged slot")
		if kek != nil {
			t.Error("Unwrap returns an error and a Secret")
		}
		return
	}
	defer kek.Close()
	if !kek.Equal(same) {
		t.Errorf("a damaged slot opens: %.200q", slot.Data)
	}
}

// checkTyped wants err to be ErrNotMine, or a cause with a hint.
func checkTyped(t *testing.T, err error, what string) {
	t.Helper()
	if errors.Is(err, seal.ErrNotMine) {
		return
	}
	e, ok := errors.AsType[*seal.Error](err)
	if !ok || e.Cause == "" || e.Hint == "" {
		t.Errorf("%s: error %q has no cause or no hint", what, err)
	}
	if len(err.Error()) > 1000 {
		t.Errorf("%s: the error has %d bytes: %.100s…", what, len(err.Error()), err)
	}
}

// testCancelled: a wrapper called with a cancelled context does not ask its backend.
func testCancelled(t *testing.T, h Harness) {
	kek := h.newKEK(t)
	slot := h.wrap(t, kek)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.Wrapper.Wrap(ctx, kek); !errors.Is(err, context.Canceled) {
		t.Errorf("Wrap: %v, want context.Canceled", err)
	}
	_, err := h.Wrapper.Unwrap(ctx, slot)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Unwrap: %v, want context.Canceled", err)
	}
	if err != nil {
		checkTyped(t, err, "Unwrap with a cancelled context")
	}
}

// testConcurrent: several goroutines may use a wrapper at the same time.
func testConcurrent(t *testing.T, h Harness) {
	var wg sync.WaitGroup
	for range callers {
		kek := h.newKEK(t)
		wg.Go(func() { h.roundTrip(t, kek) })
	}
	wg.Wait()
}

func (h Harness) roundTrip(t *testing.T, kek *seal.Secret) {
	slot, err := h.Wrapper.Wrap(t.Context(), kek)
	if err != nil {
		t.Errorf("Wrap: %v", err)
		return
	}
	got, err := h.Wrapper.Unwrap(t.Context(), slot)
	if err != nil {
		t.Errorf("Unwrap: %v", err)
		return
	}
	defer got.Close()
	if !got.Equal(kek) {
		t.Error("Unwrap returned the KEK of another caller")
	}
}

// testNothingLeft: once the caller has closed the KEKs that it got, successful and failed
// calls leave nothing behind: no goroutine, no open file, no Secret.
func testNothingLeft(t *testing.T, h Harness) {
	kek := h.newKEK(t)
	slot := h.wrap(t, kek) // after the first call the backend has all of its lasting state
	h.unwrap(t, slot).Close()
	damaged := slot
	damaged.Data = bytes.Replace(slot.Data, []byte("A"), []byte("B"), 1)
	before := count(t)
	for range 4 {
		h.roundTrip(t, kek)
		for _, data := range []json.RawMessage{damaged.Data, slot.Data[:len(slot.Data)/2], nil} {
			damaged.Data = data
			if kek, err := h.Wrapper.Unwrap(t.Context(), damaged); err == nil {
				kek.Close()
			}
		}
		if kek, err := h.Other.Unwrap(t.Context(), slot); err == nil {
			kek.Close()
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), settle)
	defer cancel()
	after := count(t)
	for after.goroutines > before.goroutines || after.files > before.files || after.secrets > before.secrets {
		if ctx.Err() != nil {
			t.Fatalf("before: %+v, after: %+v", before, after)
		}
		runtime.Gosched()
		after = count(t)
	}
}
