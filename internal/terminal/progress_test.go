package terminal

import (
	"bytes"
	"testing"
)

// TestProgress: nothing is shown where nobody watches.
func TestProgress(t *testing.T) {
	var out bytes.Buffer
	progress, done := Progress(&out, "objects")
	if done(); progress != nil || out.Len() > 0 {
		t.Errorf("%q was written", out.String())
	}
}
