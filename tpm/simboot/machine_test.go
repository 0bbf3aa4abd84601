package simboot_test

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

var banks = map[crypto.Hash]tpm2.TPMAlgID{
	crypto.SHA1: tpm2.TPMAlgSHA1, crypto.SHA256: tpm2.TPMAlgSHA256,
	crypto.SHA384: tpm2.TPMAlgSHA384, crypto.SHA512: tpm2.TPMAlgSHA512,
}

// readPCRs reads PCR 0 to 15 of a bank from the TPM.
func readPCRs(t *testing.T, d *device.Device, bank crypto.Hash) eventlog.PCRs {
	t.Helper()
	pcrs := eventlog.PCRs{}
	err := d.Do(t.Context(), func(tp transport.TPM) error {
		for pcr := range 16 {
			sel := tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
				Hash: banks[bank], PCRSelect: tpm2.PCClientCompatible.PCRs(uint(pcr))}}}
			r, err := tpm2.PCRRead{PCRSelectionIn: sel}.Execute(tp)
			if err != nil {
				return err
			}
			pcrs[pcr] = r.PCRValues.Digests[0].Buffer
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return pcrs
}

// moved lists the PCRs in which two states differ.
func moved(a, b eventlog.PCRs) []int {
	var list []int
	for pcr := range 16 {
		if !bytes.Equal(a[pcr], b[pcr]) {
			list = append(list, pcr)
		}
	}
	return list
}

func readLog(t *testing.T, m *tpmtest.Machine) *eventlog.Log {
	t.Helper()
	raw, err := os.ReadFile(m.EventLog())
	if err != nil {
		t.Fatal(err)
	}
	log, err := eventlog.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	if again := log.Encode(); !bytes.Equal(again, raw) {
		t.Error("the log does not encode to itself")
	}
	return log
}

// TestLogReplays: the logs of a boot replay to the TPM's PCRs in every bank.
func TestLogReplays(t *testing.T) {
	for _, l := range []simboot.Loader{simboot.UKI, simboot.GRUB, simboot.EFIStub, simboot.Direct} {
		for _, phases := range []string{"", simboot.AllPhases} {
			t.Run(fmt.Sprintf("%s,phases=%t", l, phases != ""), func(t *testing.T) {
				b := simboot.Baseline(l)
				b.Phases = phases
				m := tpmtest.New(t, b)
				log := readLog(t, m)
				appendUserspace(t, m, log)
				for bank := range banks {
					replayed, err := log.Replay(bank)
					if err != nil {
						t.Fatal(err)
					}
					read := readPCRs(t, m.TPM(), bank)
					for pcr, value := range read {
						want := replayed[pcr]
						if want == nil {
							want = make([]byte, bank.Size())
						}
						if !bytes.Equal(value, want) {
							t.Errorf("%v PCR %d is %x, the log replays to %x", bank, pcr, value, want)
						}
					}
				}
			})
		}
	}
}

func appendUserspace(t *testing.T, m *tpmtest.Machine, log *eventlog.Log) {
	t.Helper()
	raw, err := os.ReadFile(m.UserspaceLog())
	if m.Current().Phases == "" {
		if !errors.Is(err, os.ErrNotExist) {
			t.Errorf("userspace log of a boot without phases: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	events, err := eventlog.ParseUserspace(raw)
	if err != nil {
		t.Fatal(err)
	}
	if len(events) != 4 {
		t.Errorf("%d events in the userspace log, want 4", len(events))
	}
	log.Append(events)
}

// TestWhatMoves: a change moves the PCRs that it moved on the recorded machines, and no
// others.
func TestWhatMoves(t *testing.T) {
	type change struct {
		name string
		edit func(*simboot.Boot)
		pcrs map[simboot.Loader][]int
	}
	const uki, grub, stub, direct = simboot.UKI, simboot.GRUB, simboot.EFIStub, simboot.Direct
	type by = map[simboot.Loader][]int
	changes := []change{
		{"nothing", func(*simboot.Boot) {}, by{uki: nil, grub: nil, stub: nil, direct: nil}},
		{"kernel", func(b *simboot.Boot) { b.Kernel += "x" }, by{uki: {4, 11}, grub: {4, 8, 9}, stub: {4}, direct: nil}},
		{"initrd", func(b *simboot.Boot) { b.Initrd += "x" }, by{uki: {4, 9, 11}, grub: {9}, stub: {9}, direct: {9}}},
		{"command line", func(b *simboot.Boot) { b.CommandLine += " x" }, by{uki: {4, 9, 11}, grub: {8, 9}, stub: {9}, direct: nil}},
		{"loader", func(b *simboot.Boot) { b.LoaderVersion += "x" }, by{uki: {4}, grub: {4}, stub: nil, direct: nil}},
		{"firmware", func(b *simboot.Boot) { b.Firmware += "x" }, by{uki: {0}, grub: {0}, stub: {0}, direct: {0}}},
		{"secure boot", func(b *simboot.Boot) { b.SecureBoot = !b.SecureBoot }, by{uki: {0, 4, 7}, grub: {0, 4, 7}, stub: {0, 7}, direct: {0, 7}}},
		{"keys", func(b *simboot.Boot) { b.Keys += "x" }, by{uki: {7}, grub: {7}, stub: {7}, direct: {7}}},
		{"dbx", func(b *simboot.Boot) { b.Dbx += "x" }, by{uki: {7}, grub: {7}, stub: {7}, direct: {7}}},
		{"phases", func(b *simboot.Boot) { b.Phases = "enter-initrd" }, by{uki: {11}, grub: {11}, stub: {11}, direct: {11}}},
	}
	for _, l := range []simboot.Loader{uki, grub, stub, direct} {
		base := simboot.Baseline(l)
		base.Keys = "Example Computers" // so that Secure Boot can be switched on
		m := tpmtest.New(t, base)
		was := readPCRs(t, m.TPM(), crypto.SHA256)
		for _, c := range changes {
			b := base
			c.edit(&b)
			m.Reboot(b)
			if got := moved(was, readPCRs(t, m.TPM(), crypto.SHA256)); !slices.Equal(got, c.pcrs[l]) {
				t.Errorf("%s, other %s: PCRs %v move, want %v", l, c.name, got, c.pcrs[l])
			}
		}
	}
}

// TestUnusedPCRsAreZero: a PCR that a loader does not use keeps its reset value.
func TestUnusedPCRsAreZero(t *testing.T) {
	unused := map[simboot.Loader][]int{
		simboot.UKI: {8, 10, 12, 13, 14, 15}, simboot.GRUB: {10, 11, 12, 13, 15}, simboot.EFIStub: {8, 10, 11, 12, 13, 14, 15},
		simboot.Direct: {8, 10, 11, 12, 13, 14, 15},
	}
	for l, want := range unused {
		m := tpmtest.New(t, simboot.Baseline(l))
		var got []int
		for pcr, value := range readPCRs(t, m.TPM(), crypto.SHA256) {
			if bytes.Equal(value, make([]byte, 32)) {
				got = append(got, pcr)
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s: PCRs %v are zero, want %v", l, got, want)
		}
	}
}

// writeNV defines an NV index with data that only owner and reader know.
func writeNV(t *testing.T, d *device.Device, data string) {
	t.Helper()
	err := d.Do(t.Context(), func(tp transport.TPM) error {
		public := tpm2.TPMSNVPublic{NVIndex: nvIndex, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(data)),
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, NT: tpm2.TPMNTOrdinary, NoDA: true}}
		if _, err := (tpm2.NVDefineSpace{AuthHandle: tpm2.TPMRHOwner, PublicInfo: tpm2.New2B(public)}).Execute(tp); err != nil {
			return err
		}
		_, name, err := readNVPublic(tp)
		if err != nil {
			return err
		}
		_, err = tpm2.NVWrite{AuthHandle: tpm2.TPMRHOwner, NVIndex: tpm2.NamedHandle{Handle: nvIndex, Name: name},
			Data: tpm2.TPM2BMaxNVBuffer{Buffer: []byte(data)}}.Execute(tp)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

const nvIndex = tpm2.TPMHandle(0x01500001)

func readNVPublic(tp transport.TPM) (*tpm2.TPMSNVPublic, tpm2.TPM2BName, error) {
	r, err := tpm2.NVReadPublic{NVIndex: nvIndex}.Execute(tp)
	if err != nil {
		return nil, tpm2.TPM2BName{}, err
	}
	public, err := r.NVPublic.Contents()
	return public, r.NVName, err
}

func readNV(ctx context.Context, d *device.Device) (data string, err error) {
	err = d.Do(ctx, func(tp transport.TPM) error {
		public, name, err := readNVPublic(tp)
		if err != nil {
			return err
		}
		r, err := tpm2.NVRead{AuthHandle: tpm2.TPMRHOwner, NVIndex: tpm2.NamedHandle{Handle: nvIndex, Name: name}, Size: public.DataSize}.Execute(tp)
		if err == nil {
			data = string(r.Data.Buffer)
		}
		return err
	})
	return data, err
}

// TestStateIsKept: the TPM survives a reboot, a power cut and another Machine over
// its folder; TPM2_Clear empties it.
func TestStateIsKept(t *testing.T) {
	b := simboot.Baseline(simboot.UKI)
	m := tpmtest.New(t, b)
	writeNV(t, m.TPM(), "kept")
	expect := func(when string, m *tpmtest.Machine) {
		t.Helper()
		if got, err := readNV(t.Context(), m.TPM()); got != "kept" || err != nil {
			t.Errorf("%s: %q, %v", when, got, err)
		}
	}
	m.Reboot(b)
	expect("after a reboot", m)
	m.CutPower()
	m.Reboot(b)
	expect("after a power cut", m)
	if err := m.PowerOff(); err != nil {
		t.Fatal(err)
	}
	other := tpmtest.Attach(t, m.Dir())
	if other.Current() != b {
		t.Errorf("the folder's machine booted %+v, want %+v", other.Current(), b)
	}
	other.Reboot(b)
	expect("by another Machine", other)
	if err := other.Clear(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := readNV(t.Context(), other.TPM()); !errors.Is(err, tpm2.TPMRCHandle) {
		t.Errorf("after TPM2_Clear: %q, %v", got, err)
	}
}

func TestFolderInUse(t *testing.T) {
	b := simboot.Baseline(simboot.UKI)
	m := tpmtest.New(t, b)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	err := tpmtest.Attach(t, m.Dir()).Boot(ctx, b)
	if !errors.Is(err, simboot.ErrInUse) {
		t.Errorf("Boot over a folder in use: %v", err)
	}
	readPCRs(t, m.TPM(), crypto.SHA256) // the first is unharmed
}

func TestNewRefusesLongPaths(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 100))
	if _, err := simboot.New(dir); err == nil || !strings.Contains(err.Error(), "shorter path") {
		t.Errorf("New(%q): %v", dir, err)
	}
}

func TestNoSwtpm(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	m, err := simboot.New(filepath.Join(t.TempDir(), "m"))
	if err != nil {
		t.Fatal(err)
	}
	err = m.Boot(t.Context(), simboot.Baseline(simboot.UKI))
	if !errors.Is(err, simboot.ErrNoSwtpm) || !strings.Contains(err.Error(), "install the package swtpm") {
		t.Error(err)
	}
}

func TestBrokenState(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	if err := m.PowerOff(); err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(m.Dir(), "tpm", "tpm2-00.permall")
	if err := os.WriteFile(state, []byte("no state"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := m.Boot(t.Context(), simboot.Baseline(simboot.UKI))
	if err == nil || !strings.Contains(err.Error(), "swtpm does not start") || !strings.Contains(err.Error(), "another folder") {
		t.Error(err)
	}
}

func TestValidate(t *testing.T) {
	for name, edit := range map[string]func(*simboot.Boot){
		"loader":              func(b *simboot.Boot) { b.Loader = "lilo" },
		"no kernel":           func(b *simboot.Boot) { b.Kernel = "" },
		"long command line":   func(b *simboot.Boot) { b.CommandLine = strings.Repeat("x", 2049) },
		"control character":   func(b *simboot.Boot) { b.Initrd = "a\x00b" },
		"secure boot, no key": func(b *simboot.Boot) { b.Keys = "" },
	} {
		b := simboot.Baseline(simboot.UKI)
		if edit(&b); b.Validate() == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

func BenchmarkBoot(b *testing.B) {
	m := tpmtest.New(b, simboot.Baseline(simboot.UKI))
	for b.Loop() {
		m.Reboot(simboot.Baseline(simboot.UKI))
	}
}

// TestShutdownIsOrderly: the TPM received a shutdown before it lost its power, unless
// the power was cut; and each boot resets it.
func TestShutdownIsOrderly(t *testing.T) {
	b := simboot.Baseline(simboot.UKI)
	m := tpmtest.New(t, b)
	clock := func() (info tpm2.TPMSClockInfo) {
		t.Helper()
		err := m.TPM().Do(t.Context(), func(tp transport.TPM) error {
			r, err := tpm2.ReadClock{}.Execute(tp)
			if err == nil {
				info = r.CurrentTime.ClockInfo
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	resets := clock().ResetCount
	m.Reboot(b)
	if c := clock(); !bool(c.Safe) || c.ResetCount != resets+1 {
		t.Errorf("after an orderly reboot: %+v, want a safe clock and one reset more than %d", c, resets)
	}
	m.CutPower()
	m.Reboot(b)
	if c := clock(); bool(c.Safe) || c.ResetCount != resets+2 {
		t.Errorf("after a power cut: %+v, want a clock that is not safe and two resets more than %d", c, resets)
	}
}

// TestPowerOffWithAHangingClient: a client that holds the TPM delays the end of
// the machine by a moment only.
func TestPowerOffWithAHangingClient(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	c, err := net.Dial("unix", strings.TrimPrefix(m.Device(), "unix:"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	start := time.Now()
	if err := m.PowerOff(); err != nil || time.Since(start) > 2*time.Minute {
		t.Errorf("PowerOff: %v, after %v", err, time.Since(start))
	}
	if err := m.PowerOff(); err != nil {
		t.Errorf("PowerOff of a machine that is off: %v", err)
	}
	if err := m.Clear(t.Context()); err == nil || !strings.Contains(err.Error(), "boot it first") {
		t.Errorf("Clear of a machine that is off: %v", err)
	}
}
