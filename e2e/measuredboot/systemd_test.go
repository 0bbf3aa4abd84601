package measuredboot

import (
	"testing"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
	"github.com/beezy-dev/kleidi/seal"
)

// TestSystemd lets systemd run the machine, with kleidi's delivered unit. systemd
// measures the phases of the boot into PCR 11. The systemd of Debian 12 (252) does not
// log the phases, and kleidi finds them by their digests.
func TestSystemd(t *testing.T) {
	t.Parallel()
	m := newMachine(t, shared, ownKeys)
	system := with(uki, func(i *image) { i.systemd = true })
	m.series("UKI, systemd", []boot{
		{what: "kleidi init once the system is up", image: system, first: []wire.Step{initialize}, want: opens},
		{what: "same again: the unit starts after systemd's phases", image: system, want: opens},
		{what: "other command line", image: with(system, func(i *image) { i.commandLine = "systemd.debug-shell" }),
			want: locked, cause: seal.CauseBootState, moved: []int{4, 9, 11}, says: []string{"PCR 4", "PCR 11"}},
		{what: "the first image; kleidi reseal", image: system, then: []wire.Step{kleidi("reseal")}, want: opens},
	})
}
