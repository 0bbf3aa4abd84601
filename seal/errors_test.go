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
		{seal.Errorf(seal.CausePin, "recover", "pin: %w", inner), "pin: disk; full; see its disk", "recover"},
	} {
		if message, hint := seal.SplitHint(tc.err); message != tc.message || hint != tc.hint {
			t.Errorf("%v: %q, %q", tc.err, message, hint)
		}
	}
}
