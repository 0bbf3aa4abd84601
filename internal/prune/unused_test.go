package prune

import (
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/usage"
	"github.com/beezy-dev/kleidi/seal"
)

// TestUnused: an object under the key ID, an object under an unknown key and a snapshot
// without a checksum all keep a KEK.
func TestUnused(t *testing.T) {
	report := func(provider usage.Provider, id string, s *usage.SnapshotInfo) *usage.Report {
		count := usage.Count{Objects: 1}
		count.Provider, count.ID = provider, id
		return &usage.Report{Source: "here", Snapshot: s, Resources: []usage.Resource{{Name: "secrets", Objects: 1, Keys: []usage.Count{count}}}}
	}
	sound := &usage.SnapshotInfo{Checked: true}
	for name, row := range map[string]struct {
		report *usage.Report
		says   string
		hint   string
	}{
		"another key":               {report(usage.KMSv2, "k1-b", nil), "", ""},
		"this key":                  {report(usage.KMSv2, "k1-a", nil), "here holds 1 object under it", "kleidi migrate"},
		"an unknown key":            {report(usage.Unknown, "", nil), "1 object that may be under it", "kleidi migrate"},
		"a snapshot":                {report(usage.KMSv2, "k1-a", sound), "under it", "as long as you keep the snapshot"},
		"a snapshot without a sum":  {report(usage.KMSv2, "k1-b", &usage.SnapshotInfo{}), "proves nothing", "kleidi migrate"},
		"a snapshot of another key": {report(usage.KMSv2, "k1-b", sound), "", ""},
	} {
		err := Unused([]*usage.Report{row.report}, "k1-a")
		if err == nil || row.says == "" {
			if err != nil || row.says != "" {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if _, hint := seal.SplitHint(err); !strings.Contains(err.Error(), row.says) || !strings.Contains(hint, row.hint) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
