package bootpolicy

import (
	"crypto"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// realLogs were written by OVMF, systemd-stub, shim, GRUB and Linux under QEMU
// with a swtpm; pcrs.json holds the PCRs as the swtpm then gave them.
var realLogs = []string{"uki-secureboot", "shim-grub-secureboot", "direct-kernel"}

const realLogFolder = "../eventlog/testdata"

func rawLog(t testing.TB, name string) []byte {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(realLogFolder, name, "binary_bios_measurements"))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func realLog(t testing.TB, name string) *eventlog.Log {
	t.Helper()
	l, err := eventlog.Parse(rawLog(t, name))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// quote returns the values that the TPM had after the boot of a real log.
func quote(t testing.TB, name string, bank crypto.Hash, pcrs []int) eventlog.PCRs {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(realLogFolder, name, "pcrs.json"))
	if err != nil {
		t.Fatal(err)
	}
	var banks map[string]map[string]string
	if err := json.Unmarshal(b, &banks); err != nil {
		t.Fatal(err)
	}
	quoted := eventlog.PCRs{}
	for _, pcr := range pcrs {
		if quoted[pcr], err = hex.DecodeString(banks[strings.ToUpper(eventlog.BankName(bank))][strconv.Itoa(pcr)]); err != nil || len(quoted[pcr]) != bank.Size() {
			t.Fatalf("PCR %d: %v", pcr, err)
		}
	}
	return quoted
}

// judged are the PCRs of the boot type, and those of the firmware.
func judged(l *eventlog.Log) []int {
	pcrs := append([]int{0, 1, 2, 3, 5, 6}, l.BootType().PCRs(l)...)
	slices.Sort(pcrs)
	return pcrs
}

func record(t testing.TB, l *eventlog.Log, pcrs []int) *BootPolicy {
	t.Helper()
	p, err := Record(l, crypto.SHA256, pcrs)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// booted returns the quote of a machine that really booted in the way of the log.
func booted(t testing.TB, p *BootPolicy, l *eventlog.Log) eventlog.PCRs {
	t.Helper()
	quoted, err := p.Claimed(l)
	if err != nil {
		t.Fatal(err)
	}
	return quoted
}

// find returns the index of the first event that a person would call so.
func find(t testing.TB, l *eventlog.Log, pcr int, what string) int {
	t.Helper()
	for _, r := range Explain(l, crypto.SHA256) {
		if r.PCR == pcr && strings.Contains(r.What, what) {
			return r.Event
		}
	}
	t.Fatalf("no %q in PCR %d", what, pcr)
	return 0
}

// event makes an event as firmware or a boot loader does.
func measure(l *eventlog.Log, pcr int, typ eventlog.EventType, measured, data string) eventlog.Event {
	return eventlog.Measure(l.Banks, pcr, typ, []byte(measured), []byte(data))
}

func wide(s string) string {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return string(b)
}

const (
	globalGUID   = "\x61\xdf\xe4\x8b\xca\x93\xd2\x11\xaa\x0d\x00\xe0\x98\x03\x2b\x8c" // EFI_GLOBAL_VARIABLE
	securityGUID = "\xcb\xb2\x19\xd7\x3a\x3d\x96\x45\xa3\xbc\xda\xd0\x0e\x67\x65\x6f" // EFI_IMAGE_SECURITY_DATABASE_GUID
)

// variable returns a UEFI_VARIABLE_DATA.
func variable(vendor, name, value string) string {
	b := binary.LittleEndian.AppendUint64([]byte(vendor), uint64(len(wide(name))/2))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(value)))
	return string(b) + wide(name) + value
}

// insert puts events into a log at an index.
func insert(l *eventlog.Log, at int, events ...eventlog.Event) {
	l.Events = slices.Insert(l.Events, at, events...)
}

func remove(l *eventlog.Log, at int) { l.Events = slices.Delete(l.Events, at, at+1) }

// removeAll removes all events of a PCR.
func removeAll(l *eventlog.Log, pcr int) {
	l.Events = slices.DeleteFunc(l.Events, func(e eventlog.Event) bool { return e.PCR == pcr })
}

// digests returns the ordered digests of each of the PCRs.
func digests(l *eventlog.Log, pcrs []int) map[int][]string {
	of := map[int][]string{}
	for _, e := range l.Events {
		if e.UntrustedType != eventlog.NoAction && slices.Contains(pcrs, e.PCR) {
			of[e.PCR] = append(of[e.PCR], string(e.Digest(crypto.SHA256)))
		}
	}
	return of
}

func sameDigests(a, b map[int][]string) bool {
	return maps.EqualFunc(a, b, slices.Equal)
}

func deepCopy(l *eventlog.Log) *eventlog.Log {
	c := &eventlog.Log{Banks: slices.Clone(l.Banks), Events: slices.Clone(l.Events)}
	for i := range c.Events {
		e := &c.Events[i]
		e.UntrustedData = slices.Clone(e.UntrustedData)
		e.Digests = slices.Clone(e.Digests)
		for k := range e.Digests {
			e.Digests[k].Value = slices.Clone(e.Digests[k].Value)
		}
	}
	return c
}
