package eventlog_test

import (
	"slices"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestPhases: the phases that user space measured, and none that a log only claims.
func TestPhases(t *testing.T) {
	for phases, want := range map[string][]string{
		"": nil, "enter-initrd": {"enter-initrd"}, simboot.AllPhases: {"enter-initrd", "leave-initrd", "sysinit", "ready"},
	} {
		b := simboot.Baseline(simboot.UKI)
		b.Phases = phases
		m := tpmtest.New(t, b)
		log, err := attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}.Read()
		if err != nil {
			t.Fatal(err)
		}
		if got := log.Phases(); !slices.Equal(got, want) {
			t.Errorf("%q: %v, want %v", phases, got, want)
		}
		for i := range log.Events {
			if e := &log.Events[i]; string(e.UntrustedData) == "leave-initrd" {
				e.UntrustedData = []byte("ready")
			}
		}
		if got := log.Phases(); len(want) > 1 && len(got) != len(want)-1 {
			t.Errorf("%q, one claimed: %v", phases, got)
		}
	}
}
