package measuredboot

import (
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
	"github.com/beezy-dev/kleidi/seal"
)

// other is an unprepared boot.
var other = with(uki, func(i *image) { i.kernel, i.commandLine = "somebody@example.org", "quiet" })

func TestSuspend(t *testing.T) {
	t.Parallel()
	m := newMachine(t, shared, ownKeys)
	moved := []int{4, 9, 11}
	m.series("UKI, suspended", []boot{
		{what: "the first image; kleidi suspend --boots 3", image: uki, first: []wire.Step{initialize},
			then: []wire.Step{kleidi("suspend", "--boots", "3")}, want: opens},
		{what: "other kernel and command line, boot 1 of 3", image: other, want: opens, moved: moved, check: suspended},
		{what: "Secure Boot off, boot 2 of 3", image: uki, before: func(m *machine) { m.setVariables(noKeys) },
			want: locked, cause: seal.CauseBootState, moved: []int{4, 7}, says: []string{"PCR 7"}},
		{what: "other kernel and command line, boot 3 of 3", image: other, before: func(m *machine) { m.setVariables(ownKeys) },
			want: opens, moved: moved, check: suspended},
		{what: "other kernel and command line, one more boot", image: other,
			want: locked, cause: seal.CauseBootState, moved: moved, says: []string{"PCR 4"}},
		{what: "the first image, after all of the above", image: uki, want: opens},
	})
}

// suspended demands that kleidi status shows the suspension.
func suspended(t *testing.T, b *booted) {
	t.Helper()
	for _, r := range b.results {
		if r.Step != nil && r.Step.Serve && !strings.Contains(r.Status, `"use": "suspend"`) {
			t.Errorf("kleidi status does not show the suspension: %s", r.Status)
		}
	}
}
