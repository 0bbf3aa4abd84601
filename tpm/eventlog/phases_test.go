package eventlog_test

import (
	"crypto"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestPhases: Phases returns the phases that user space measured, and no phase that a
// log only claims.
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

// TestUnloggedPhases: the digests lead to the phases that an old systemd measured
// without logging, and to nothing else.
func TestUnloggedPhases(t *testing.T) {
	for phases, want := range map[string]string{
		"": "", "enter-initrd": "enter-initrd", simboot.AllPhases: simboot.AllPhases, "sysinit:ready": "sysinit:ready", "sysinit": "sysinit",
		simboot.AllPhases + ":shutdown:final": simboot.AllPhases + ":shutdown:final",
		"ready":                               "", "enter-initrd:sysinit": "", "sysinit:ready:mallory": "", "ready:sysinit": "",
	} {
		b := simboot.Baseline(simboot.UKI)
		b.Phases = phases
		m := tpmtest.New(t, b)
		log, err := attest.Logs{Firmware: m.EventLog(), Userspace: t.TempDir() + "/none"}.Read()
		if err != nil {
			t.Fatal(err)
		}
		for _, bank := range []crypto.Hash{crypto.SHA256, crypto.SHA384} {
			var quoted eventlog.PCRs
			err = m.TPM().Do(t.Context(), func(tp transport.TPM) error {
				quoted, err = keys.ReadPCRs(tp, bank, []int{4, 7, 11})
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			raw := log.UnloggedPhases(bank, quoted)
			events, err := eventlog.ParseUserspace(raw)
			if err != nil {
				t.Fatal(err)
			}
			whole := &eventlog.Log{Banks: log.Banks, Events: append(slices.Clone(log.Events), events...)}
			if got := strings.Join(whole.Phases(), ":"); got != want {
				t.Errorf("%q: %q, want %q", phases, got, want)
			}
			if err := whole.Verify(bank, quoted); (err == nil) != (phases == want) {
				t.Errorf("%q: %v", phases, err)
			}
			quoted[4] = make([]byte, bank.Size())
			if log.UnloggedPhases(bank, quoted) != nil {
				t.Errorf("%q: another PCR is wrong as well, and phases are guessed", phases)
			}
		}
	}
}
