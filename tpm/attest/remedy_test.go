package attest_test

import (
	"crypto"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// told demands that a refusal has this cause and contains all of these words. The
// refusal must not suspect tampering, an outage or a broken TPM.
func told(t *testing.T, what string, err error, cause seal.Cause, permanent bool, words ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: it passes", what)
		return
	}
	if seal.CauseOf(err) != cause || seal.IsPermanent(err) != permanent {
		t.Errorf("%s: cause %q, permanent %v: %v", what, seal.CauseOf(err), seal.IsPermanent(err), err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %q does not say %q", what, err, w)
		}
	}
	for _, w := range []string{"tampered", "tpm.pcrs", "faulty", "makes no sense", "tries again"} {
		if strings.Contains(err.Error(), w) && !slices.ContainsFunc(words, func(s string) bool { return strings.Contains(s, w) }) {
			t.Errorf("%s: %q speaks of %q", what, err, w)
		}
	}
}

// TestEachErrorHasItsRemedy: each fault of a log or of a TPM has its own error and
// remedy.
func TestEachErrorHasItsRemedy(t *testing.T) {
	n := newNode(t, phased())
	m := n.machine
	firmware, userspace := readFile(t, m.EventLog()), readFile(t, m.UserspaceLog())
	whole, err := eventlog.Parse(firmware)
	if err != nil {
		t.Fatal(err)
	}
	edited := func(change func(*eventlog.Log)) []byte {
		l, err := eventlog.Parse(firmware)
		if err != nil {
			t.Fatal(err)
		}
		change(l)
		return l.Encode()
	}
	for name, c := range map[string]struct {
		firmware, userspace []byte
		cause               seal.Cause
		permanent           bool
		words               []string
	}{
		"an empty log": {[]byte{}, userspace, seal.CauseAttestation, true,
			[]string{"firmware event log: event log: the log is empty", "Azure's Trusted Launch", "unlock.order"}},
		"the SHA-1 format": {readFile(t, "../eventlog/testdata/firmware/sha1-format"), nil, seal.CauseAttestation, true,
			[]string{"the log is in the SHA-1 format of TPM 1.2; set the firmware's TPM to 2.0 with a SHA-256 bank"}},
		"a log of SHA-384 alone": {whole.Only(crypto.SHA384).Encode(), userspace, seal.CauseConfiguration, true,
			[]string{"the event log has no sha256 digests; it has sha384; set tpm.bank: sha384"}},
		"a log of SHA-1 alone": {whole.Only(crypto.SHA1).Encode(), userspace, seal.CauseConfiguration, true,
			[]string{"the event log has no sha256 digests; it has sha1; switch on SHA-256 in the firmware's settings"}},
		"an event without the bank": {edited(func(l *eventlog.Log) { l.Events[3] = only(l.Events[3], crypto.SHA384) }), userspace, seal.CauseConfiguration, true,
			[]string{"event 3 on PCR ", "has no sha256 digest", "set tpm.bank to one that every event has"}},
		"a truncated log": {firmware[:len(firmware)-1], userspace, seal.CauseAttestation, false,
			[]string{"truncated", "the log breaks the rules of its format"}},
		"a log that two parsers read in two ways": {edited(func(l *eventlog.Log) {
			l.Events = slices.Insert(l.Events, 0, eventlog.Informational(l.Banks, 0, []byte("StartupLocality!\x03")))
		}), userspace, seal.CauseAttestation, true, []string{"go-attestation's replay disagrees", "two parsers read this log in two ways"}},
		"an event left out": {edited(func(l *eventlog.Log) { i := last(l, 4); l.Events = slices.Delete(l.Events, i, i+1) }), userspace, seal.CauseAttestation, false,
			[]string{"does not lead to the quoted value of PCR 4", "leave that PCR out with tpm.pcrs; else the log was tampered with"}},
	} {
		n.gate.Logs = logsOf(t, c.firmware, c.userspace)
		_, err := n.gate.AttestPCRs(t.Context(), []int{0, 4, 7, 11})
		told(t, name, err, c.cause, c.permanent, c.words...)
		if name == "an empty log" || name == "the SHA-1 format" { // no PCRs can be chosen by such a log either
			_, err = n.gate.State(t.Context())
			told(t, name+", read", err, c.cause, c.permanent, c.words...)
		}
	}
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// logsOf returns logs with this content.
func logsOf(t *testing.T, firmware, userspace []byte) attest.Logs {
	t.Helper()
	dir := t.TempDir()
	l := attest.Logs{Firmware: filepath.Join(dir, "firmware"), Userspace: filepath.Join(dir, "userspace")}
	replaceFile(t, l.Firmware, firmware)
	if userspace != nil {
		replaceFile(t, l.Userspace, userspace)
	}
	return l
}

// TestTPMWithOtherBanks: the fault is in the configuration or in the firmware's
// settings, not in the TPM.
func TestTPMWithOtherBanks(t *testing.T) {
	for name, c := range map[string]struct {
		banks []tpm2.TPMAlgID
		words []string
	}{
		"SHA-384 alone":     {[]tpm2.TPMAlgID{tpm2.TPMAlgSHA384}, []string{"the TPM has no sha256 bank; it has sha384 alone; set tpm.bank: sha384"}},
		"SHA-1 alone":       {[]tpm2.TPMAlgID{tpm2.TPMAlgSHA1}, []string{"the TPM has no sha256 bank; it has sha1 alone; switch on SHA-256 in the firmware's settings"}},
		"SHA-1 and SHA-384": {[]tpm2.TPMAlgID{tpm2.TPMAlgSHA1, tpm2.TPMAlgSHA384}, []string{"it has sha1, sha384; set tpm.bank: sha384"}},
		"SHA-512 alone":     {[]tpm2.TPMAlgID{tpm2.TPMAlgSHA512}, []string{"it has sha512 alone; switch on SHA-256"}},
	} {
		n := newNode(t, simboot.Baseline(simboot.UKI))
		slot := n.seal()
		n.machine.Allocate(c.banks...)
		n.machine.Reboot(n.machine.Current())
		_, err := n.gate.State(t.Context())
		told(t, name+", to seal", err, seal.CauseConfiguration, true, c.words...)
		told(t, name+", to open", n.gate.Attest(t.Context(), []seal.Slot{slot}), seal.CauseConfiguration, true, c.words...)
		anchor, err := nv.NewAnchor(nv.DefaultAnchorIndex, keys.Owner{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = (&nv.AnchorStore{Anchor: anchor, Device: n.machine.TPM(), Bank: crypto.SHA256, PCRs: []int{4, 7, 11}}).Load(t.Context())
		told(t, name+", the anchor", err, seal.CauseConfiguration, true, c.words...)
		if slices.Contains(c.banks, tpm2.TPMAlgSHA384) {
			n.gate.Bank = crypto.SHA384
			if _, err := n.gate.State(t.Context()); err != nil {
				t.Errorf("%s: what the hint says does not help: %v", name, err)
			}
		}
	}
}

// TestRestartWithoutAReset: after a soft-reboot or kexec the TPM refuses. The message
// says what happened, and nothing is sealed to a state that no full boot reaches.
func TestRestartWithoutAReset(t *testing.T) {
	const again = ":shutdown:final:sysinit:ready"
	for phases, c := range map[string]struct {
		name     string
		unlogged bool // UnloggedPhases finds it too
	}{
		simboot.AllPhases + again:         {"soft-reboot", true},
		simboot.AllPhases + again + again: {"soft-reboot", true},
		"sysinit:ready" + again + again:   {"soft-reboot", true},
		simboot.AllPhases + ":shutdown:final:enter-initrd:leave-initrd:sysinit:ready": {"kexec", false},
	} {
		for _, logged := range []bool{true, false} {
			if !logged && !c.unlogged {
				continue
			}
			b := phased()
			if strings.HasPrefix(phases, "sysinit") {
				b.Phases = "sysinit:ready"
			}
			n := newNode(t, b)
			n.gate.Phase = "ready"
			slot := n.seal()
			b.Phases = phases
			n.machine.Reboot(b)
			if !logged { // an older systemd
				n.gate.Logs.Userspace = "/nonexistent"
			}
			err := n.refusal(slot)
			told(t, phases, err, seal.CauseBootState, false, "systemd shut down and started again without a reset of the machine ("+c.name+"); reboot fully")
			for _, words := range []string{"After=", "boot the earlier kernel", "boot phase", "kleidi recover"} {
				if strings.Contains(err.Error(), words) {
					t.Errorf("%s: %q says %q", phases, err, words)
				}
			}
			_, err = n.gate.State(t.Context())
			told(t, phases+", to seal", err, seal.CauseAttestation, false, "a KEK sealed now would not open after the next boot", c.name, "reboot fully")
		}
	}
}

// TestRestartAndAnotherKernel: the refusal also names the other difference.
func TestRestartAndAnotherKernel(t *testing.T) {
	n := newNode(t, phased())
	slot := n.seal()
	b := phased()
	b.Kernel, b.Phases = "6.13.1", simboot.AllPhases+":shutdown:final:sysinit:ready"
	n.machine.Reboot(b)
	told(t, "both", n.refusal(slot), seal.CauseBootState, false, "(soft-reboot)", "PCR 11: kernel changed", "reboot fully; if it stays locked, boot the earlier kernel")
}

// TestResumeFromHibernation: the TPM was reset, and the memory with both logs comes
// from the earlier boot.
func TestResumeFromHibernation(t *testing.T) {
	n := newNode(t, phased())
	slot := n.seal()
	n.gate.Logs = logsOf(t, readFile(t, n.machine.EventLog()), readFile(t, n.machine.UserspaceLog()))
	b := phased()
	for _, b.Phases = range []string{"", "enter-initrd", "enter-initrd:leave-initrd"} {
		n.machine.Reboot(b)
		told(t, b.Phases, n.gate.Attest(t.Context(), []seal.Slot{slot}), seal.CauseAttestation, true,
			"the TPM has measured less than the log lists", "resumed from hibernation", "reboot fully; else the log was tampered with")
	}
	n.machine.Reboot(phased())
	if err := n.gate.Attest(t.Context(), []seal.Slot{slot}); err != nil {
		t.Errorf("after a full boot: %v", err)
	}
	// An older systemd logs no phases: the TPM refuses, and the phase explains it.
	n.gate.Logs.Userspace = "/nonexistent"
	b.Phases = "enter-initrd"
	n.machine.Reboot(b)
	told(t, "without a userspace log", n.refusal(slot), seal.CauseBootState, false, "boot phase is gone", "or the machine resumed from hibernation: reboot fully")
}

// TestRemedyNamesTheSetting: the setting that leaves a PCR out differs between a
// verifier and a node; the remedy names the right one.
func TestRemedyNamesTheSetting(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	e := collect(t, m, ordinary)
	e = edit(t, e, func(l *eventlog.Log) { i := last(l, 4); l.Events = slices.Delete(l.Events, i, i+1) })
	hint := attest.RemedyOf(ordinary.verify(e)).Hint("the node's boot policy")
	if !strings.Contains(hint, "leave that PCR out with the node's boot policy") {
		t.Error(hint)
	}
}
