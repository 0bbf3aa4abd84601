package seal_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

func TestSplitHint(t *testing.T) {
	inner := seal.Errorf(seal.CauseStore, "see its disk", "disk; full")
	for _, tc := range []struct {
		err           error
		message, hint string
	}{
		{errors.New("a; b"), "a; b", ""},
		{seal.Errorf(seal.CauseStore, "", "a; b"), "a; b", ""},
		{inner, "disk; full", "see its disk"},
		{fmt.Errorf("save: %w", inner), "save: disk; full", "see its disk"},
		{fmt.Errorf("%w, and more", inner), "disk; full; see its disk, and more", "see its disk"},
		{seal.Errorf(seal.CauseAnchor, "recover", "anchor: %w", inner), "anchor: disk; full; see its disk", "recover"},
	} {
		if message, hint := seal.SplitHint(tc.err); message != tc.message || hint != tc.hint {
			t.Errorf("%v: %q, %q", tc.err, message, hint)
		}
	}
}

func TestOneLine(t *testing.T) {
	for in, want := range map[string]string{
		"":                        "",
		"PCR 4: shim":             "PCR 4: shim",
		"a\nb\x1b[31m\u202ec\xff": "a?b?[31m?c\ufffd",
		"twelve runes":            "twelve runes",
		"thirteen runä":           "thirteen run…",
	} {
		if got := seal.OneLine(in, 12); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestHints(t *testing.T) {
	reason := errors.New("no answer")
	inner := seal.Errorf(seal.CauseUnavailable, "see its power", "the token: %w", reason)
	for _, tc := range []struct {
		err           error
		message, hint string
		cause         seal.Cause
	}{
		{seal.AddHint(inner, "or skip it"), "the token: no answer", "see its power; or skip it", seal.CauseUnavailable},
		{seal.AddHint(fmt.Errorf("wrap: %w", inner), "or skip it"), "wrap: the token: no answer", "see its power; or skip it", seal.CauseUnavailable},
		{seal.AddHint(reason, "ask again"), "no answer", "ask again", ""},
		{seal.WithHint(inner, "replace it"), "the token: no answer", "replace it", seal.CauseUnavailable},
		{fmt.Errorf("rotate: %w", seal.WithHint(inner, "replace it")), "rotate: the token: no answer", "replace it", seal.CauseUnavailable},
	} {
		if message, hint := seal.SplitHint(tc.err); message != tc.message || hint != tc.hint {
			t.Errorf("%v: %q, %q", tc.err, message, hint)
		}
		if seal.CauseOf(tc.err) != tc.cause || !errors.Is(tc.err, reason) {
			t.Errorf("%v: cause %q, and its reason is lost: %t", tc.err, seal.CauseOf(tc.err), !errors.Is(tc.err, reason))
		}
	}
}

func TestWithoutRecovery(t *testing.T) {
	reason := errors.New("another kernel")
	plain := seal.Errorf(seal.CauseBootState, "boot as before", "%w", reason)
	or := func() *seal.Error {
		return seal.Errorf(seal.CauseBootState, "boot as before", "%w", reason).OrRecover()
	}
	alone := seal.Errorf(seal.CauseEpoch, "", "%w", reason).OrRecover()
	for _, tc := range []struct {
		err           error
		with, without string
	}{
		{plain, "boot as before", "boot as before"},
		{or(), "boot as before, or run kleidi recover with the recovery identity", "boot as before"},
		{fmt.Errorf("unlock: %w", or()), "boot as before, or run kleidi recover with the recovery identity", "boot as before"},
		{seal.AddHint(or(), "or skip it"), "boot as before, or run kleidi recover with the recovery identity; or skip it", "boot as before; or skip it"},
		{seal.WithHint(or(), "wait"), "wait", "wait"},
		{alone, "run kleidi recover with the recovery identity", "the keyring has no recovery slot; if a backup has one, run kleidi keyring restore BACKUP --identity-file FILE"},
	} {
		message, hint := seal.SplitHint(tc.err)
		if hint != tc.with {
			t.Errorf("%v: %q, want %q", tc.err, hint, tc.with)
		}
		without := seal.WithoutRecovery(tc.err)
		if m, hint := seal.SplitHint(without); hint != tc.without || m != message {
			t.Errorf("%v: %q, %q, want %q", without, m, hint, tc.without)
		}
		if seal.CauseOf(without) != seal.CauseOf(tc.err) || !errors.Is(without, reason) {
			t.Errorf("%v: cause or chain is lost", without)
		}
	}
}
