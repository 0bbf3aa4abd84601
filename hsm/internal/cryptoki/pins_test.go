//go:build cgo

package cryptoki

import (
	"bytes"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// TestMayRepeat: which PIN may be given to a token again.
func TestMayRepeat(t *testing.T) {
	const trouble, refused = pkcs11.Error(pkcs11.CKR_DEVICE_ERROR), pkcs11.Error(pkcs11.CKR_PIN_INCORRECT)
	name, right, other := keyslot.TokenName{Label: "t", Serial: "1"}, pinMark{1}, pinMark{2}
	for what, row := range map[string]struct {
		before func(*pinRecord)
		answer pkcs11.Error
		flags  uint
		want   bool
	}{
		"trouble":                       {nil, trouble, 0, true},
		"trouble, count low":            {nil, trouble, pkcs11.CKF_USER_PIN_COUNT_LOW, false},
		"trouble, final try":            {nil, trouble, pkcs11.CKF_USER_PIN_FINAL_TRY, false},
		"trouble, locked":               {nil, trouble, pkcs11.CKF_USER_PIN_LOCKED, false},
		"refused":                       {nil, refused, 0, false},
		"unknown answer":                {nil, pkcs11.CKR_ARGUMENTS_BAD, 0, false},
		"unknown answer, PIN known":     {func(t *pinRecord) { t.succeeded(name, right) }, pkcs11.CKR_ARGUMENTS_BAD, 0, true},
		"trouble, count low, PIN known": {func(t *pinRecord) { t.succeeded(name, right) }, trouble, pkcs11.CKF_USER_PIN_COUNT_LOW, true},
		"unknown answer, another PIN":   {func(t *pinRecord) { t.succeeded(name, other) }, pkcs11.CKR_ARGUMENTS_BAD, 0, false},
		"unknown answer, another's PIN": {func(t *pinRecord) { t.succeeded(keyslot.TokenName{Label: "u", Serial: "2"}, right) }, pkcs11.CKR_ARGUMENTS_BAD, 0, false},
		"refused, PIN known":            {func(t *pinRecord) { t.succeeded(name, right) }, refused, 0, false},
		"known until refused":           {func(t *pinRecord) { t.succeeded(name, right); t.failed(name, right, refused) }, pkcs11.CKR_ARGUMENTS_BAD, 0, false},
		"known in spite of trouble":     {func(t *pinRecord) { t.succeeded(name, right); t.failed(name, right, trouble) }, pkcs11.CKR_ARGUMENTS_BAD, 0, true},
	} {
		r := newPINRecord()
		if row.before != nil {
			row.before(&r)
		}
		if got := r.mayRepeat(name, right, row.answer, row.flags); got != row.want {
			t.Errorf("%s: %v", what, got)
		}
	}
	r := newPINRecord()
	if r.mayRepeat(name, pinMark{}, pkcs11.CKR_ARGUMENTS_BAD, 0) {
		t.Error("a token that accepted no PIN yet")
	}
	r.failed(name, right, refused)
	r.failed(name, other, trouble)
	r.succeeded(name, other)
	if len(r.answers) != 0 {
		t.Errorf("after a login the record still has %v", r.answers)
	}
}

// TestMark: a mark depends on the PIN and on the record, and the PIN isn't left beside the
// key of the marks.
func TestMark(t *testing.T) {
	pin := func(text string) *seal.Secret {
		p := must[*seal.Secret](t)(seal.Memory{}.Take([]byte(text)))
		t.Cleanup(func() { p.Close() })
		return p
	}
	r, o := newPINRecord(), newPINRecord()
	mark := func(r *pinRecord, text string) pinMark { return must[pinMark](t)(r.mark(seal.Memory{}, pin(text))) }
	a := mark(&r, "1234-secret")
	if a != mark(&r, "1234-secret") || a == mark(&r, "1234-secret ") || a == mark(&r, "1234") || a == mark(&o, "1234-secret") {
		t.Error("the marks of two PINs or of two records are the same, or those of one differ")
	}
	r.key.With(func(b []byte) {
		if len(bytes.Trim(b[:markKeySize], "\x00")) < markKeySize/2 || len(bytes.Trim(b[markKeySize:], "\x00")) != 0 {
			t.Error("the key of the marks is not random, or the PIN is left beside it")
		}
	})
}
