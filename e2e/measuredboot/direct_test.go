package measuredboot

import (
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/bootrule"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// TestKernelOfTheHypervisor: QEMU hands a kernel to the firmware. The firmware starts
// it with Secure Boot on, and neither verifies nor measures it. kleidi init refuses,
// and package simboot's Direct measures the same as the firmware.
func TestKernelOfTheHypervisor(t *testing.T) {
	t.Parallel()
	m := newMachine(t, shared, ownKeys)
	kernel := must[string](t)(shared.kernelFile(uki))
	initrd := must[string](t)(shared.initrdFile(uki))
	m.handed = []string{"-kernel", kernel, "-initrd", initrd, "-append", uki.line()}
	b, err := m.boot(uki, nil, initialize)
	if err != nil {
		t.Fatal(err)
	}
	facts := b.facts()
	if facts == nil || !facts.SecureBoot {
		t.Fatalf("Secure Boot is off: %+v", facts)
	}
	log, err := eventlog.Parse(facts.EventLog)
	if err != nil {
		t.Fatal(err)
	}
	if s := log.SecureBootState(); s != eventlog.SecureBootIdle {
		t.Errorf("Secure Boot is %s, want %s", s, eventlog.SecureBootIdle)
	}
	if got, want := log.Measured(), (eventlog.Measured{Initrd: true}); got != want {
		t.Errorf("measured: %+v, want %+v, as %s has it", got, want, simboot.Direct)
	}
	if err := bootrule.Check(log, bootrule.Decisive(), bootrule.SignedBoot); err == nil {
		t.Error("the rule takes the boot")
	}
	refused := b.results[1]
	if refused.Error == "" || !strings.Contains(refused.Stderr, "boot program (PCR 4 has no image") || !strings.Contains(refused.Stderr, "on, and nothing was verified") {
		t.Errorf("kleidi init: %s", describe(refused))
	}
}
