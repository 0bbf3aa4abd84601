package attest_test

import (
	"bytes"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// node is a machine with its gate and its wrapper.
type node struct {
	*testing.T
	machine *tpmtest.Machine
	gate    *attest.Gate
	wrapper *tpm.Wrapper
}

func newNode(t *testing.T, b simboot.Boot) *node {
	t.Helper()
	m := tpmtest.New(t, b)
	counter, err := nv.NewCounter(nv.DefaultEpochIndex, keys.Owner{})
	if err != nil {
		t.Fatal(err)
	}
	g := &attest.Gate{Node: "alpha", Attester: *attester(m), Counter: counter, Bank: crypto.SHA256}
	w := tpm.NewWrapper(tpm.Config{Device: m.TPM(), Counter: counter, Node: "alpha", State: g.State})
	if _, err := w.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	return &node{t, m, g, w}
}

func (n *node) seal() seal.Slot {
	n.Helper()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		n.Fatal(err)
	}
	defer kek.Close()
	slot, err := n.wrapper.Wrap(n.Context(), kek)
	if err != nil {
		n.Fatal(err)
	}
	return slot
}

// refusal attests, opens the slot and returns the explained refusal.
func (n *node) refusal(slot seal.Slot) error {
	n.Helper()
	if err := n.gate.Attest(n.Context(), []seal.Slot{slot}); err != nil {
		n.Fatalf("Attest: %v", err)
	}
	kek, err := n.wrapper.Unwrap(n.Context(), slot)
	if err == nil {
		kek.Close()
		n.Fatal("the slot opens")
	}
	return n.gate.Explain(err)
}

// TestExplain: the refusal names the PCR that differs, the event that changed, and its
// old and new value.
func TestExplain(t *testing.T) {
	for _, c := range []struct {
		name   string
		loader simboot.Loader
		change func(*simboot.Boot)
		says   []string
	}{
		{"kernel", simboot.UKI, func(b *simboot.Boot) { b.Kernel = "6.12.99-amd64" }, []string{"booted with another kernel:", "PCR 4: unified kernel image", "PCR 11: kernel changed", "usually a kernel update"}},
		{"command line", simboot.UKI, func(b *simboot.Boot) { b.CommandLine = "root=/dev/sda1 init=/bin/sh" }, []string{"the machine booted with another command line:", "PCR 4: ", "PCR 11: kernel command line changed"}},
		{"initrd", simboot.UKI, func(b *simboot.Boot) { b.Initrd = "another" }, []string{"the machine booted with another initrd:", "PCR 4: ", "PCR 11: initrd changed", "usually a rebuilt initrd"}},
		{"Secure Boot", simboot.UKI, func(b *simboot.Boot) { b.SecureBoot = false }, []string{"the machine booted with Secure Boot off", "PCR 7: Secure Boot changed: was on, now off", "firmware's setup"}},
		{"dbx", simboot.UKI, func(b *simboot.Boot) { b.Dbx = "2026-01-01" }, []string{"the machine booted with another list of revoked boot programs:", "PCR 7: list of revoked boot programs (dbx) changed"}},
		{"keys", simboot.UKI, func(b *simboot.Boot) { b.Keys = "Mallory" }, []string{"other keys of Secure Boot", "PCR 7: Secure Boot platform key (PK) changed: was Example Computers Platform Key, now Mallory Platform Key"}},
		{"stub", simboot.UKI, func(b *simboot.Boot) { b.LoaderVersion = "258" }, []string{"the machine booted another unified kernel image:", "PCR 4: unified kernel image"}},
		{"phase", simboot.UKI, func(b *simboot.Boot) { b.Phases = "enter-initrd:leave-initrd" }, []string{"another phase of the boot than the slot is sealed to:", "PCR 11: boot phase is new: enter-initrd", "After=systemd-pcrphase.service"}},
		{"loader", simboot.UKI, func(b *simboot.Boot) { *b = simboot.Baseline(simboot.GRUB) }, []string{"the machine was booted by GRUB instead of as a UKI:", "PCR 4: boot loader changed", "shimx64.efi", "PCR 11: kernel is gone"}},
		{"kernel", simboot.GRUB, func(b *simboot.Boot) { b.Kernel = "6.12.99-amd64" }, []string{"the machine booted with another kernel and another command line:", "PCR 4: kernel changed", `PCR 8: kernel command line changed: was "/boot/vmlinuz-6.12.57+deb13-amd64 root`, `now "/boot/vmlinuz-6.12.99-amd64 root`, "PCR 9: kernel changed"}},
		{"command line", simboot.GRUB, func(b *simboot.Boot) { b.CommandLine = "root=/dev/sda1 init=/bin/sh" }, []string{"the machine booted with another command line:", "PCR 8: kernel command line changed: was", "root=/dev/mapper/root ro quiet", "now", "init=/bin/sh", "usually the command line was edited"}},
		{"initrd", simboot.GRUB, func(b *simboot.Boot) { b.Initrd = "another" }, []string{"the machine booted with another initrd:", "PCR 9: initrd (/boot/initrd.img-6.12.57+deb13-amd64) changed"}},
		{"GRUB", simboot.GRUB, func(b *simboot.Boot) { b.LoaderVersion = "2.14" }, []string{"the machine booted with another boot loader:", `PCR 4: boot loader (\EFI\debian\grubx64.efi) changed`, "usually a boot loader update"}},
		{"command line", simboot.EFIStub, func(b *simboot.Boot) { b.CommandLine = "init=/bin/sh" }, []string{"the machine booted with another command line:", "PCR 9: kernel command line changed"}},
		{"kernel", simboot.EFIStub, func(b *simboot.Boot) { b.Kernel = "6.12.99-amd64" }, []string{"the machine booted with another kernel:", `PCR 4: kernel (\EFI\debian\vmlinuz.efi) changed`}},
	} {
		t.Run(string(c.loader)+" "+c.name, func(t *testing.T) {
			n := newNode(t, simboot.Baseline(c.loader))
			slot := n.seal()
			b := n.machine.Current()
			c.change(&b)
			n.machine.Reboot(b)
			err := n.refusal(slot)
			if seal.CauseOf(err) != seal.CauseBootState {
				t.Errorf("%v: cause %q", err, seal.CauseOf(err))
			}
			for _, words := range append(c.says, "kleidi recover") {
				if !strings.Contains(err.Error(), words) {
					t.Errorf("%q does not say %q", err, words)
				}
			}
			checkOthersAreSilent(t, err, c.says)
			if explained, ok := errors.AsType[*attest.Explained](err); !ok || len(explained.Differences) == 0 {
				t.Errorf("%v holds no differences", err)
			}
		})
	}
}

// checkOthersAreSilent: the refusal names no unchanged PCR.
func checkOthersAreSilent(t *testing.T, err error, says []string) {
	t.Helper()
	for i := range 24 {
		pcr := fmt.Sprintf("PCR %d: ", i)
		if strings.Contains(err.Error(), pcr) && !strings.Contains(strings.Join(says, " ")+" PCR 4: PCR 7: PCR 8: PCR 9: ", pcr) {
			t.Errorf("%q names PCR %d", err, i)
		}
	}
}

// TestExplainLeavesOtherErrors: Explain returns other errors unchanged, and every error
// if it knows nothing.
func TestExplainLeavesOtherErrors(t *testing.T) {
	n := newNode(t, simboot.Baseline(simboot.UKI))
	slot := n.seal()
	b := n.machine.Current()
	b.Kernel = "another"
	n.machine.Reboot(b)
	err := n.refusal(slot)
	for _, other := range []error{nil, errors.New("disk full"), seal.Errorf(seal.CauseEpoch, "hint", "passed")} {
		if got := n.gate.Explain(other); got != other {
			t.Errorf("%v becomes %v", other, got)
		}
	}
	if got := new(attest.Gate).Explain(err); got != err {
		t.Errorf("without an attestation, %v becomes %v", err, got)
	}
}

// TestCompareTrustsNoRecord: a slot's claim about its boot explains nothing if the
// claim does not lead to the slot's PCR values.
func TestCompareTrustsNoRecord(t *testing.T) {
	n := newNode(t, simboot.Baseline(simboot.GRUB))
	was, err := n.gate.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b := n.machine.Current()
	b.CommandLine = "init=/bin/sh"
	n.machine.Reboot(b)
	if _, err := n.gate.State(t.Context()); err != nil {
		t.Fatal(err)
	}
	text := func(was tpm.BootState) string { return fmt.Sprint(attest.Compare(&was, n.gate.Last())) }
	if honest := text(was); !strings.Contains(honest, "init=/bin/sh") {
		t.Fatalf("honest: %s", honest)
	}
	for name, record := range map[string]json.RawMessage{
		"none": nil, "not JSON": json.RawMessage("{"), "another form": json.RawMessage(`{"pcr":8}`), "no events": json.RawMessage("[]"),
		"an invented event": json.RawMessage(`[{"pcr":8,"type":"EV_IPL","digest":"` + strings.Repeat("00", 32) + `","what":"kernel command line: forged"}]`),
		"no digest":         json.RawMessage(`[{"pcr":8,"type":"EV_IPL","digest":"x","what":"kernel command line: forged"}]`),
	} {
		lying := was
		lying.Record = record
		got := text(lying)
		if strings.Contains(got, "forged") || strings.Contains(got, "is new") || !strings.Contains(got, "PCR 8: value changed") || !strings.Contains(got, "no event of it was recorded") {
			t.Errorf("%s: %s", name, got)
		}
	}
	otherBank := was
	otherBank.Bank = crypto.SHA384
	if got := attest.Compare(&otherBank, n.gate.Last()); got != nil {
		t.Errorf("another bank: %v", got)
	}
}

// TestStateChoosesPCRs: the way in which the machine boots chooses the PCRs, unless the
// configuration does.
func TestStateChoosesPCRs(t *testing.T) {
	insecure, setup, noCommandLine := simboot.Baseline(simboot.UKI), simboot.Baseline(simboot.UKI), simboot.Baseline(simboot.UKI)
	insecure.SecureBoot, setup.SecureBoot, setup.Keys, noCommandLine.CommandLine = false, false, "", ""
	for name, c := range map[string]struct {
		boot       simboot.Boot
		configured []int
		want       []int
	}{
		"UKI":                  {simboot.Baseline(simboot.UKI), nil, []int{4, 7, 11}},
		"UKI, Secure Boot off": {insecure, nil, []int{4, 7, 9, 11}},
		"UKI, setup mode":      {setup, nil, []int{4, 7, 9, 11}},
		"UKI, no .cmdline":     {noCommandLine, nil, []int{4, 7, 9, 11}},
		"UKI, phases":          {phased(), nil, []int{4, 7, 11}},
		"GRUB":                 {simboot.Baseline(simboot.GRUB), nil, []int{4, 7, 8, 9, 14}},
		"EFI stub":             {simboot.Baseline(simboot.EFIStub), nil, []int{4, 7, 9}},
		"configured":           {simboot.Baseline(simboot.UKI), []int{4, 7, 9, 11}, []int{4, 7, 9, 11}},
	} {
		for bank := range authpolicy.Banks {
			n := newNode(t, c.boot)
			n.gate.PCRs, n.gate.Bank = c.configured, bank
			s, err := n.gate.State(t.Context())
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if got := slices.Sorted(maps.Keys(s.Values)); !slices.Equal(got, c.want) || s.Bank != bank {
				t.Errorf("%s: PCRs %v (%v), want %v", name, got, s.Bank, c.want)
			}
			var record []eventlog.Summary
			if err := json.Unmarshal(s.Record, &record); err != nil || len(record) == 0 {
				t.Errorf("%s: %d events recorded, %v", name, len(record), err)
			}
			replayed, err := eventlog.ReplaySummary(record, bank, 0)
			for i, v := range s.Values {
				if err != nil || !bytes.Equal(replayed[i], v) {
					t.Errorf("%s: the record does not lead to PCR %d: %v", name, i, err)
				}
			}
		}
	}
}

// TestGateRefuses: the gate refuses a machine that can't be attested, with a cause and
// a remedy, before a slot is opened and before a slot is made.
func TestGateRefuses(t *testing.T) {
	n := newNode(t, phased())
	slot := n.seal()
	good, err := os.ReadFile(n.machine.EventLog())
	if err != nil {
		t.Fatal(err)
	}
	log, err := eventlog.Parse(good)
	if err != nil {
		t.Fatal(err)
	}
	measured := log.Events
	log.Events = slices.DeleteFunc(slices.Clone(measured), func(e eventlog.Event) bool { return e.PCR == 11 })
	sectionless := log.Encode()
	log.Events = measured[1:]
	firmwareless := log.Encode()
	firmware, userspace := n.gate.Logs.Firmware, n.gate.Logs.Userspace
	phases, err := os.ReadFile(userspace)
	if err != nil {
		t.Fatal(err)
	}
	half := phases[:bytes.LastIndexByte(phases, 0x1e)]
	missing, file := filepath.Join(t.TempDir(), "none"), func(b []byte) string {
		path := filepath.Join(t.TempDir(), "log")
		replaceFile(t, path, b)
		return path
	}
	for name, c := range map[string]struct {
		logs attest.Logs
		pcrs []int
		says []string
		on   string // the refused operation: "seal", "open" or both
	}{
		"no firmware log":      {attest.Logs{Firmware: missing, Userspace: userspace}, nil, []string{"firmware event log", "securityfs", "tpm.eventLog", missing}, "seal open"},
		"a folder":             {attest.Logs{Firmware: t.TempDir(), Userspace: userspace}, nil, []string{"firmware event log", "tpm.eventLog"}, "seal open"},
		"an empty log":         {attest.Logs{Firmware: file(nil), Userspace: userspace}, nil, []string{"firmware event log", "the log is empty"}, "seal open"},
		"a truncated log":      {attest.Logs{Firmware: file(good[:len(good)-1]), Userspace: userspace}, nil, []string{"firmware event log", "truncated"}, "seal open"},
		"a huge log":           {attest.Logs{Firmware: file(make([]byte, eventlog.MaxSize+1)), Userspace: userspace}, nil, []string{"larger than 16 MiB"}, "seal open"},
		"half a userspace log": {attest.Logs{Firmware: firmware, Userspace: file(half)}, nil, []string{"PCR 11", "without logging it", "tpm.pcrs"}, "seal open"},
		"userspace, a folder":  {attest.Logs{Firmware: firmware, Userspace: t.TempDir()}, nil, []string{"tpm.userspaceEventLog"}, "seal open"},
		"userspace, garbage":   {attest.Logs{Firmware: firmware, Userspace: file([]byte("x"))}, nil, []string{"userspace event log", "tpm.userspaceEventLog"}, "seal open"},
		"a tampered log":       {attest.Logs{Firmware: file(sectionless), Userspace: userspace}, nil, []string{"PCR 11"}, "open"},
		"another PCR tampered": {attest.Logs{Firmware: file(firmwareless), Userspace: userspace}, []int{0, 7}, []string{"PCR 0"}, "seal"},
	} {
		n.gate.Logs, n.gate.PCRs = c.logs, c.pcrs
		var errs []error
		if strings.Contains(c.on, "seal") {
			_, err := n.gate.State(t.Context())
			errs = append(errs, err)
		}
		if strings.Contains(c.on, "open") {
			errs = append(errs, n.gate.Attest(t.Context(), []seal.Slot{slot}))
		}
		for _, err := range errs {
			e, ok := errors.AsType[*seal.Error](err)
			if !ok || e.Cause != seal.CauseAttestation || e.Hint == "" {
				t.Errorf("%s: %v: cause %q", name, err, seal.CauseOf(err))
				continue
			}
			for _, words := range c.says {
				if !strings.Contains(err.Error(), words) {
					t.Errorf("%s: %q does not say %q", name, err, words)
				}
			}
		}
		if n.gate.Passed() {
			t.Errorf("%s: the gate says that the last attestation passed", name)
		}
	}
	n.gate.Logs, n.gate.PCRs = attest.Logs{Firmware: firmware, Userspace: userspace}, nil
	if err := n.gate.Attest(t.Context(), []seal.Slot{slot}); err != nil || !n.gate.Passed() {
		t.Errorf("afterwards: %v", err)
	}
}

// TestUnloggedPhases: a systemd that measures the phases of the boot without logging
// them, as in Debian 12, does not prevent an attestation.
func TestUnloggedPhases(t *testing.T) {
	n := newNode(t, phased())
	n.gate.Logs.Userspace = filepath.Join(t.TempDir(), "none")
	slot := n.seal()
	if err := n.gate.Attest(t.Context(), []seal.Slot{slot}); err != nil {
		t.Fatal(err)
	}
	kek, err := n.wrapper.Unwrap(t.Context(), slot)
	if err != nil {
		t.Fatal(err)
	}
	kek.Close()
	if got := n.gate.Last().Log.Phases(); strings.Join(got, ":") != phased().Phases {
		t.Errorf("%v", got)
	}
}

// TestAttestDemandsWhatTheSlotsDo: Attest demands all PCRs of all slots of this node,
// in their banks, and nothing of other slots.
func TestAttestDemandsWhatTheSlotsDo(t *testing.T) {
	n := newNode(t, simboot.Baseline(simboot.UKI))
	first := n.seal()
	n.gate.PCRs = []int{0, 2, 4, 7, 9, 11}
	second := n.seal()
	damaged, elsewhere, recovery := first, first, first
	damaged.Data, elsewhere.Node, recovery.Type = first.Data[1:], "beta", seal.TypeRecovery
	for name, c := range map[string]struct {
		slots []seal.Slot
		want  []int
	}{
		"one": {[]seal.Slot{first}, []int{4, 7, 11}}, "two": {[]seal.Slot{second, first}, []int{0, 2, 4, 7, 9, 11}},
		"and others'": {[]seal.Slot{damaged, elsewhere, recovery, second}, []int{0, 2, 4, 7, 9, 11}},
	} {
		if err := n.gate.Attest(t.Context(), c.slots); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := slices.Sorted(maps.Keys(n.gate.Last().PCRs)); !slices.Equal(got, c.want) {
			t.Errorf("%s: quoted %v, want %v", name, got, c.want)
		}
	}
	before := n.gate.Last()
	if err := n.gate.Attest(t.Context(), []seal.Slot{damaged, elsewhere, recovery}); err != nil || n.gate.Last() != before {
		t.Errorf("slots that demand nothing: %v", err)
	}
}
