package supervise

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
)

// TestKeep: a part that fails is logged and started again; a part that ends well, or must
// end, is not.
func TestKeep(t *testing.T) {
	var text bytes.Buffer
	log := slog.New(slog.NewTextHandler(&text, nil))
	calls := 0
	Keep(t.Context(), log, "a part", func() error {
		if calls++; calls < 3 {
			return errors.New("no folder")
		}
		return nil
	})
	if calls != 3 || strings.Count(text.String(), `msg="a part failed" error="no folder"`) != 2 {
		t.Errorf("%d calls, %s", calls, &text)
	}
	ctx, cancel := context.WithCancel(t.Context())
	text.Reset()
	Keep(ctx, log, "a part", func() error { calls++; cancel(); return errors.New("closed") })
	Keep(ctx, log, "a part", func() error { calls++; return nil })
	if calls != 4 || text.Len() > 0 {
		t.Errorf("%d calls, %s", calls, &text)
	}
}
