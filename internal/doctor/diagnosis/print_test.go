package diagnosis

import (
	"slices"
	"strings"
	"testing"
)

func TestPrint(t *testing.T) {
	r := Report{Checks: []string{"tpm", "clock"}}
	for _, c := range []struct {
		id, last string
	}{
		{"", "2 checks, 0 findings\n"},
		{"tpm/missing", "2 checks, 1 finding\n"},
		{"clock/unsynchronised", "2 checks, 2 findings, of which 1 note can wait\n"},
	} {
		if c.id != "" {
			r.Add(c.id, slices.Concat(Found(c.id, "true", "it is so"), NotChecked("not asked")))
		}
		var b strings.Builder
		r.Print(&b)
		if !strings.HasSuffix(b.String(), "\n"+c.last) && b.String() != c.last {
			t.Errorf("%s", b.String())
		}
	}
}
