package attest

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// TestRecordIsBounded: a record that is too long loses its text first, then everything.
func TestRecordIsBounded(t *testing.T) {
	for _, c := range []struct {
		events       int
		events2, txt bool // whether events, and their text, are kept
	}{{0, true, true}, {50, true, true}, {150, true, false}, {1000, false, false}} {
		all := make([]eventlog.Summary, c.events)
		for i := range all {
			all[i] = eventlog.Summary{PCR: 8, Type: "EV_IPL", Digest: strings.Repeat("ab", 48), What: strings.Repeat("é", 160)}
		}
		b, err := record(all)
		if err != nil || len(b) > maxRecord {
			t.Errorf("%d events: %d bytes, %v", c.events, len(b), err)
		}
		var kept []eventlog.Summary
		if len(b) > 0 {
			if err := json.Unmarshal(b, &kept); err != nil {
				t.Fatal(err)
			}
		}
		if c.events2 != (len(kept) == c.events) || c.events > 0 && c.txt != (len(kept) > 0 && kept[0].What != "") {
			t.Errorf("%d events: %d kept in %d bytes", c.events, len(kept), len(b))
		}
	}
}
