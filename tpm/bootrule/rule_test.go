package bootrule

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

const logs = "../eventlog/testdata"

func readLog(t *testing.T, file string) *eventlog.Log {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	l, err := eventlog.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// real is a log of a real boot.
func real(t *testing.T, name string) *eventlog.Log {
	t.Helper()
	return readLog(t, filepath.Join(logs, name, "binary_bios_measurements"))
}

// A change makes another boot of a log.
type change func(l *eventlog.Log)

// without leaves out the events of a PCR for which is holds, or all of its events.
func without(pcr int, is ...func(eventlog.Event) bool) change {
	return func(l *eventlog.Log) {
		l.Events = slices.DeleteFunc(l.Events, func(e eventlog.Event) bool { return e.PCR == pcr && (len(is) == 0 || is[0](e)) })
	}
}

// with adds an event.
func with(pcr int, typ eventlog.EventType, measured, data string) change {
	return func(l *eventlog.Log) {
		l.Events = append(l.Events, eventlog.Measure(l.Banks, pcr, typ, []byte(measured), []byte(data)))
	}
}

func typed(typ eventlog.EventType) func(eventlog.Event) bool {
	return func(e eventlog.Event) bool { return e.UntrustedType == typ }
}

// tagged finds what Linux's EFI stub measured; the tags are in its efistub.h.
func tagged(tag uint32) func(eventlog.Event) bool {
	return func(e eventlog.Event) bool {
		return len(e.UntrustedData) >= 4 && binary.LittleEndian.Uint32(e.UntrustedData) == tag
	}
}

var (
	image       = typed(eventlog.EFIBootServicesApp)
	loadOptions = tagged(0x8f3b22ed)
	initrd      = tagged(0x8f3b22ec)
)

// section finds the name of a UKI's section.
func section(name string) func(eventlog.Event) bool {
	return func(e eventlog.Event) bool { return e.Proves([]byte(name + "\x00")) }
}

func data(prefix string) func(eventlog.Event) bool {
	return func(e eventlog.Event) bool { return strings.HasPrefix(string(e.UntrustedData), prefix) }
}

// secureBootOff measures the variable as 0. Its value is the last byte of its data.
func secureBootOff(l *eventlog.Log) {
	for i, e := range l.Events {
		if e.PCR == 7 && e.UntrustedType == eventlog.EFIVariableDriverConfig {
			off := append(slices.Clone(e.UntrustedData[:len(e.UntrustedData)-1]), 0)
			l.Events[i] = eventlog.Measure(l.Banks, 7, e.UntrustedType, off, off)
			return // it is the first
		}
	}
}

func wide(s string) string {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return string(b)
}

var (
	uki    = "uki-secureboot"
	grub   = "shim-grub-secureboot"
	direct = "direct-kernel"

	all    = []Part{Program, Kernel, Initrd, CommandLine}
	behind = []Part{Kernel, Initrd, CommandLine}
)

// TestRule: for each boot type, what a set of PCRs leaves open, and whether it is
// accepted as a whole boot and as any signed boot.
func TestRule(t *testing.T) {
	for name, c := range map[string]struct {
		log     string
		changes []change
		pcrs    []int
		open    []Part
		signed  bool   // good for SignedBoot
		says    string // of the refusal
	}{
		"UKI":                                {log: uki, pcrs: []int{4, 7, 11}},
		"UKI, in any order":                  {log: uki, pcrs: []int{11, 7, 4}},
		"UKI and more":                       {log: uki, pcrs: []int{0, 2, 4, 7, 9, 11}},
		"UKI without PCR 4":                  {log: uki, pcrs: []int{7, 11}, open: all, signed: true, says: "PCR 4 is left out"},
		"UKI, firmware and PCR 11":           {log: uki, pcrs: []int{0, 11}, open: all, says: "any boot program can extend PCR 8 to 15"},
		"UKI, PCR 11 alone":                  {log: uki, pcrs: []int{11}, open: all, says: "PCR 7, which shows Secure Boot, is left out"},
		"UKI, PCR 4 alone":                   {log: uki, pcrs: []int{4}, open: behind, says: "PCR 11 is left out"},
		"UKI, PCR 4 and 7":                   {log: uki, pcrs: []int{4, 7}, open: behind, signed: true},
		"UKI, PCR 7 alone":                   {log: uki, pcrs: []int{7}, open: all, signed: true, says: "whatever Secure Boot's keys let start would be let in"},
		"UKI, PCR 4 and 11":                  {log: uki, pcrs: []int{4, 11}, open: []Part{CommandLine}, says: "PCR 9 is left out"},
		"UKI, 4, 9 and 11":                   {log: uki, pcrs: []int{4, 9, 11}},
		"UKI, Secure Boot off":               {log: uki, changes: []change{secureBootOff}, pcrs: []int{4, 7, 11}, open: []Part{CommandLine}, says: "Secure Boot is off"},
		"UKI, Secure Boot off, with PCR 9":   {log: uki, changes: []change{secureBootOff}, pcrs: []int{4, 7, 9, 11}},
		"UKI, off, PCR 7 alone":              {log: uki, changes: []change{secureBootOff}, pcrs: []int{7}, open: all, says: "Secure Boot is off"},
		"UKI, off, PCR 0 and 7":              {log: uki, changes: []change{secureBootOff}, pcrs: []int{0, 7}, open: all, says: "Secure Boot is off"},
		"UKI, nothing verified":              {log: uki, changes: []change{without(7, typed(eventlog.EFIVariableAuthority))}, pcrs: []int{4, 7, 11}, open: []Part{CommandLine}, says: "on, and nothing was verified"},
		"UKI, nothing verified, PCR 7 alone": {log: uki, changes: []change{without(7, typed(eventlog.EFIVariableAuthority))}, pcrs: []int{7}, open: all},
		"UKI, Secure Boot unknown":           {log: uki, changes: []change{without(7, typed(eventlog.Separator))}, pcrs: []int{7}, open: all, says: "Secure Boot is unknown"},
		"UKI, no image":                      {log: uki, changes: []change{without(4, image)}, pcrs: []int{4, 7, 11}, open: all, signed: true, says: "PCR 4 has no image"},
		"UKI, no image, Secure Boot off":     {log: uki, changes: []change{without(4, image), secureBootOff}, pcrs: []int{4, 7, 9, 11}, open: all},
		"UKI, no command line":               {log: uki, changes: []change{without(11, section(".cmdline"))}, pcrs: []int{4, 7, 11}, open: []Part{CommandLine}, signed: true, says: "the image has none"},
		"UKI, no command line, PCR 9":        {log: uki, changes: []change{without(11, section(".cmdline"))}, pcrs: []int{4, 7, 9, 11}},
		"UKI, older kernel":                  {log: uki, changes: []change{secureBootOff, without(9, loadOptions)}, pcrs: []int{4, 7, 9, 11}, open: []Part{CommandLine}, says: "PCR 9 has none"},
		"UKI, older kernel, PCR 12": {log: uki, changes: []change{secureBootOff, without(9, loadOptions), with(12, eventlog.IPL, wide("quiet"), wide("quiet"))},
			pcrs: []int{4, 7, 9, 11, 12}},
		"UKI, claimed PCR 12": {log: uki, changes: []change{secureBootOff, without(9, loadOptions), with(12, eventlog.IPL, "x", wide("quiet"))},
			pcrs: []int{4, 7, 9, 11, 12}, open: []Part{CommandLine}},
		"UKI, no initrd in it":           {log: uki, changes: []change{without(11, section(".initrd"))}, pcrs: []int{4, 7, 11}, open: []Part{Initrd}, signed: true, says: "initrd (PCR 9 is left out)"},
		"UKI, no initrd, PCR 9":          {log: uki, changes: []change{without(11, section(".initrd"))}, pcrs: []int{4, 7, 9, 11}},
		"UKI, no initrd, PCR 9 empty":    {log: uki, changes: []change{without(11, section(".initrd")), without(9)}, pcrs: []int{4, 7, 9, 11}, open: []Part{Initrd}, signed: true, says: "measured none into PCR 9"},
		"UKI, no section of the kernel":  {log: uki, changes: []change{without(11, section(".linux")), without(9)}, pcrs: []int{4, 7, 9, 11}, open: behind, signed: true, says: "no unified kernel image in PCR 11"},
		"the system wrote PCR 11":        {log: direct, changes: []change{without(9), with(11, eventlog.EventTag, eventlog.OSSeparator, eventlog.OSSeparator), with(11, eventlog.IPL, ".linux\x00", "")}, pcrs: []int{4, 7, 11}, open: behind},
		"the system wrote PCR 4":         {log: uki, changes: []change{without(4), with(4, eventlog.EventTag, eventlog.OSSeparator, eventlog.OSSeparator), theImage}, pcrs: []int{4, 7, 11}, open: all, signed: true},
		"GRUB":                           {log: grub, pcrs: []int{4, 7, 8, 9, 14}},
		"GRUB without shim's keys":       {log: grub, pcrs: []int{4, 7, 8, 9}},
		"GRUB, PCR 4, 8 and 9":           {log: grub, pcrs: []int{4, 8, 9}},
		"GRUB, PCR 4 and 7":              {log: grub, pcrs: []int{4, 7}, open: behind, signed: true, says: "PCR 8 is left out"},
		"GRUB without PCR 8":             {log: grub, pcrs: []int{4, 7, 9, 14}, open: behind, signed: true, says: "PCR 8 is left out"},
		"GRUB without PCR 9":             {log: grub, pcrs: []int{4, 7, 8, 14}, open: []Part{Kernel, Initrd}, signed: true, says: "kernel and initrd (PCR 9 is left out)"},
		"GRUB without PCR 4":             {log: grub, pcrs: []int{7, 8, 9}, open: all, signed: true},
		"GRUB, 8 and 9":                  {log: grub, pcrs: []int{8, 9}, open: all},
		"GRUB measured no files":         {log: grub, changes: []change{without(9)}, pcrs: []int{4, 7, 8, 9}, open: []Part{Kernel, Initrd}, signed: true, says: "GRUB measured no file"},
		"GRUB measured no command line":  {log: grub, changes: []change{without(8, data("kernel_cmdline"))}, pcrs: []int{4, 7, 8, 9}, open: []Part{CommandLine}, signed: true, says: "GRUB measured none into PCR 8"},
		"GRUB's command line is claimed": {log: grub, changes: []change{without(8, data("kernel_cmdline")), with(8, eventlog.IPL, "x", "kernel_cmdline: /vmlinuz quiet")}, pcrs: []int{4, 7, 8, 9}, open: []Part{CommandLine}, signed: true},
		"GRUB, and the kernel measures":  {log: grub, changes: []change{without(8, data("kernel_cmdline")), fromStub}, pcrs: []int{4, 7, 8, 9}},
		"GRUB started a UKI": {log: grub, changes: []change{without(8, data("kernel_cmdline")), with(11, eventlog.IPL, ".linux\x00", ""), with(11, eventlog.IPL, ".cmdline\x00", "")},
			pcrs: []int{4, 7, 8, 9, 11, 14}},
		"GRUB started a UKI, Secure Boot off": {log: grub, changes: []change{secureBootOff, without(8, data("kernel_cmdline")), with(11, eventlog.IPL, ".linux\x00", ""), with(11, eventlog.IPL, ".cmdline\x00", "")},
			pcrs: []int{4, 7, 8, 9, 11, 14}, open: []Part{CommandLine}, says: "systemd-stub takes another one unless Secure Boot is on"},
		"EFI stub":                       {log: direct, pcrs: []int{4, 7, 9}},
		"EFI stub without PCR 7":         {log: direct, pcrs: []int{4, 9}},
		"EFI stub, PCR 4 and 7":          {log: direct, pcrs: []int{4, 7}, open: behind, says: "PCR 9 is left out"},
		"EFI stub without PCR 4":         {log: direct, pcrs: []int{7, 9}, open: all},
		"EFI stub, no initrd":            {log: direct, changes: []change{without(9, initrd)}, pcrs: []int{4, 7, 9}},
		"EFI stub, initrd alone":         {log: direct, changes: []change{without(9, loadOptions)}, pcrs: []int{4, 7, 9}, open: []Part{Kernel, CommandLine}, says: "no EFI stub in PCR 9"},
		"started by the hypervisor":      {log: uki, changes: hypervisor, pcrs: []int{4, 7, 9}, open: all, says: "boot program (PCR 4 has no image, only actions and separators)"},
		"started by it, PCR 7 alone":     {log: uki, changes: hypervisor, pcrs: []int{7}, open: all, says: "on, and nothing was verified"},
		"started by it, everything":      {log: uki, changes: hypervisor, pcrs: []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11}, open: all},
		"no PCR":                         {log: uki, open: all, says: "no PCR holds what boots"},
		"nothing was measured":           {log: uki, changes: []change{func(l *eventlog.Log) { l.Events = nil }}, pcrs: []int{4, 7, 11}, open: all},
		"an action that claims an image": {log: uki, changes: []change{without(4, image), actionAsImage}, pcrs: []int{4, 7, 11}, open: all, signed: true},
	} {
		t.Run(name, func(t *testing.T) {
			l := real(t, c.log)
			for _, f := range c.changes {
				f(l)
			}
			b := Of(l, c.pcrs)
			var open []Part
			for _, o := range b.Open {
				if o.Why == "" {
					t.Errorf("%s: open without a reason", o.Part)
				}
				open = append(open, o.Part)
			}
			slices.SortFunc(open, func(a, b Part) int { return slices.Index(all, a) - slices.Index(all, b) })
			if !slices.Equal(open, c.open) {
				t.Errorf("open: %v, want %v", open, c.open)
			}
			whole, signed := b.Check(WholeBoot), b.Check(SignedBoot)
			if (whole == nil) != (len(c.open) == 0) || (signed == nil) != (c.signed || len(c.open) == 0) {
				t.Errorf("whole boot: %v\nany signed one: %v", whole, signed)
			}
			if refusal, ok := errors.AsType[*Refusal](whole); whole != nil && (!ok || !reflect.DeepEqual(refusal.Binding, b) || !strings.Contains(whole.Error(), c.says)) {
				t.Errorf("it says %q, want %q", whole, c.says)
			}
			if (b.Describe() == "") != (len(c.open) == 0) {
				t.Errorf("described as %q", b.Describe())
			}
		})
	}
}

// hypervisor makes a boot by the firmware's direct kernel path, with Secure Boot on: PCR
// 4 has an action and a separator, PCR 9 the initrd.
var hypervisor = []change{without(4, image), without(7, typed(eventlog.EFIVariableAuthority)), without(9, loadOptions), without(11)}

// theImage measures an image in the same way as the first image of the log.
func theImage(l *eventlog.Log) { with(4, eventlog.EFIBootServicesApp, "an image", imageLoad)(l) }

// imageLoad is an EFI_IMAGE_LOAD_EVENT of one byte and no path.
var imageLoad = "\x00\x00\x00\x00\x00\x00\x00\x00\x01" + strings.Repeat("\x00", 23)

func actionAsImage(l *eventlog.Log) {
	with(4, eventlog.EFIBootServicesApp, "Calling EFI Application from Boot Option", imageLoad)(l)
}

// fromStub makes the measurements of Linux's EFI stub.
func fromStub(l *eventlog.Log) {
	with(9, eventlog.EventTag, "quiet", "\xed\x22\x3b\x8f\x00\x00\x00\x00")(l)
}

// TestWhole: the PCRs that kleidi chooses by how a machine boots hold the whole boot, and
// a refusal of others names them.
func TestWhole(t *testing.T) {
	for name, want := range map[string][]int{uki: {4, 7, 11}, grub: {4, 7, 8, 9, 14}, direct: {4, 7, 9}} {
		l := real(t, name)
		if got := Of(l, []int{7}).Whole; !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
		if err := Check(l, want, WholeBoot); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		l.Events = slices.DeleteFunc(l.Events, func(e eventlog.Event) bool { return e.PCR == 4 })
		if got := Of(l, []int{7}).Whole; got != nil {
			t.Errorf("%s: without a boot program, PCR %v would do", name, got)
		}
	}
}

// TestPublicLogs: boots of known types in other projects' test data can be bound by the
// PCRs that kleidi chooses. The others are refused, with the reason.
func TestPublicLogs(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(logs, "public", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	every := []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15}
	unknown := map[string]string{
		"arch-linux-workstation.bin": "no EFI stub in PCR 9", // its kernel measures nothing, its boot loader PCR 8
		"glinux-alex.bin":            "no GRUB in PCR 8",
		"crypto_agile_eventlog":      "no GRUB in PCR 8",
		"sb_cert_eventlog":           "no GRUB in PCR 8",
	}
	bound, read := 0, 0
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		l, err := eventlog.Parse(raw)
		if err != nil {
			continue // eventlog's tests say why
		}
		read++
		name := filepath.Base(file)
		if says, ok := unknown[name]; ok {
			if err := Check(l, every, WholeBoot); err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %v, want %q", name, err, says)
			}
			continue
		}
		if err := Check(l, l.BootType().PCRs(l), WholeBoot); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		bound++
	}
	if read < 17 || bound < 12 {
		t.Errorf("%d logs read, %d bound", read, bound)
	}
}

// TestRefusalsSayWhat: a refusal is one line, with each part once.
func TestRefusalsSayWhat(t *testing.T) {
	l := real(t, uki)
	off := real(t, uki)
	secureBootOff(off)
	for _, c := range []struct {
		log  *eventlog.Log
		pcrs []int
		want string
	}{
		{l, []int{0, 11}, "PCR 0, 11 leave open what boots: boot program (PCR 4 is left out); command line (systemd-stub takes another one unless Secure Boot is on, and PCR 9 is left out); kernel and initrd (any boot program can extend PCR 8 to 15 to the same values); PCR 7, which shows Secure Boot, is left out"},
		{off, []int{7}, "PCR 7 leaves open what boots: boot program (PCR 4 is left out); kernel, initrd and command line (PCR 11 is left out); Secure Boot is off"},
	} {
		if got := fmt.Sprint(Check(c.log, c.pcrs, WholeBoot)); got != c.want {
			t.Errorf("%s\nwant %s", got, c.want)
		}
	}
	if got, want := Of(l, []int{7}).Describe(), "any boot program, kernel, initrd and command line that Secure Boot's keys let start"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestPossible: a configuration that can't hold a boot is refused without a log.
func TestPossible(t *testing.T) {
	for _, c := range []struct {
		pcrs          []int
		whole, signed bool
	}{
		{[]int{4, 7, 11}, true, true}, {[]int{4}, true, true}, {[]int{7}, false, true}, {[]int{0, 7}, false, true},
		{[]int{0, 11}, false, false}, {[]int{11}, false, false}, {[]int{0, 1, 2, 3, 5, 6, 8, 9, 11}, false, false}, {nil, false, false},
	} {
		if whole, signed := Possible(c.pcrs, WholeBoot), Possible(c.pcrs, SignedBoot); (whole == nil) != c.whole || (signed == nil) != c.signed {
			t.Errorf("%v: whole boot %v, any signed one %v", c.pcrs, whole, signed)
		}
	}
}
