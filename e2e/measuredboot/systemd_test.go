package measuredboot

import (
	"testing"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
	"github.com/beezy-dev/kleidi/seal"
)

// TestSystemd has systemd run the machine, and kleidi's unit as it is delivered.
// systemd measures the phases of the boot into PCR 11; that of Debian 12 (252) logs
// nothing of it, so that this PCR can't be attested there. PCR 4 holds the whole
// image, signed as it is, and PCR 9 what the stub gives the kernel.
func TestSystemd(t *testing.T) {
	t.Parallel()
	m := newMachine(t, shared, ownKeys)
	const without11 = "tpm:\n  pcrs: [4, 7, 9]\n"
	m.settings = without11
	system := with(uki, func(i *image) { i.systemd = true })
	m.series("UKI, systemd", []boot{
		{what: "tpm.pcrs: [4, 7, 9]; kleidi init once the system is up", image: system, first: []wire.Step{initialize}, want: opens},
		{what: "same again: the unit starts after systemd's phases", image: system, want: opens},
		{what: "other command line", image: with(system, func(i *image) { i.commandLine = "systemd.debug-shell" }),
			want: locked, cause: seal.CauseBootState, moved: []int{4, 9, 11}, says: []string{"PCR 4"}},
		{what: "no tpm.pcrs; kleidi reseal is refused", image: system, before: func(m *machine) { m.settings = "" },
			then: []wire.Step{kleidi("reseal")}, refused: "the event log does not lead to the quoted value of PCR 11", want: opens},
	})
}
