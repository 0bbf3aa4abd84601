package recovery_test

import (
	"errors"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/recovery"
)

// TestWrapLike: the next KEK is wrapped to the recipients of a recovery slot. Slots of
// other types are refused.
func TestWrapLike(t *testing.T) {
	opener, next := newOpener(t), newKEK(t)
	like, err := opener.Wrap(t.Context(), newKEK(t))
	if err != nil {
		t.Fatal(err)
	}
	r := recovery.Rewrapper{}
	slot, err := r.WrapLike(t.Context(), next, like)
	if err != nil {
		t.Fatal(err)
	}
	got, err := opener.Unwrap(t.Context(), slot)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !got.Equal(next) {
		t.Error("the slot holds another KEK")
	}
	like.Type = seal.TypeTPM
	if _, err := r.WrapLike(t.Context(), next, like); !errors.Is(err, seal.ErrNotMine) {
		t.Error(err)
	}
	if _, err := r.WrapLike(t.Context(), next, seal.Slot{Type: seal.TypeRecovery, Data: []byte(`{"recipients":[],"age":""}`)}); err == nil {
		t.Error("a KEK is wrapped to nobody")
	}
}
