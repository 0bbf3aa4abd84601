package eventlog

import (
	"bytes"
	"crypto"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

var allPCRs = []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}

// remeasure replaces the measurement of an event; with nil data the log's text stays.
func remeasure(l *Log, i int, measured, data []byte) {
	e := l.Events[i]
	if data == nil {
		data = e.UntrustedData
	}
	l.Events[i] = Measure(l.Banks, e.PCR, e.UntrustedType, measured, data)
}

func remeasureVariable(l *Log, i int, data []byte) {
	v, err := parseVariable(l.Events[i].UntrustedData)
	if err != nil {
		panic(err)
	}
	v.data = data
	remeasure(l, i, v.encode(), v.encode())
}

// compare returns the lines for a real boot and an edited one.
func compare(t *testing.T, name string, pcrs []int, edit func(l *Log)) []string {
	t.Helper()
	was, now := parseLog(t, name), parseLog(t, name)
	edit(now)
	wasPCR, err := was.Replay(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	nowPCR, err := now.Replay(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, d := range Compare(was.Summarize(crypto.SHA256, pcrs), now.Summarize(crypto.SHA256, pcrs), wasPCR, nowPCR) {
		if slices.Contains(pcrs, d.PCR) {
			lines = append(lines, d.String())
		}
	}
	return lines
}

func TestCompareTellsWhatChanged(t *testing.T) {
	uki, grub := []int{4, 7, 11}, []int{4, 7, 8, 9, 14}
	x := []byte("x")
	for name, c := range map[string]struct {
		log  string
		pcrs []int
		edit func(l *Log)
		want []string
	}{
		"nothing": {"uki-secureboot", allPCRs, func(*Log) {}, nil},
		"only a type and data, which nothing proves": {"uki-secureboot", allPCRs, func(l *Log) {
			l.Events[3].UntrustedType, l.Events[3].UntrustedData = Action, x
		}, nil},
		"UKI, command line": {"uki-secureboot", uki, func(l *Log) {
			remeasure(l, 23, x, nil)
			remeasure(l, 29, x, nil)
		}, []string{
			`PCR 4: unified kernel image (\EFI\BOOT\BOOTX64.EFI) changed: was 1783b7756354…, now 2d711642b726… (usually its kernel, initrd, command line or stub was updated)`,
			`PCR 11: kernel command line changed: was 9936b932d368…, now 2d711642b726… (usually a unified kernel image built with another command line)`,
		}},
		"UKI, kernel and initrd": {"uki-secureboot", []int{11}, func(l *Log) {
			remeasure(l, 25, x, nil)
			remeasure(l, 31, x, nil)
		}, []string{
			`PCR 11: kernel changed: was 26f2e57c9933…, now 2d711642b726… (usually a kernel update)`,
			`PCR 11: initrd changed: was 8bc65108deea…, now 2d711642b726… (usually a rebuilt initrd, after a kernel or driver update)`,
		}},
		"UKI, no command line any more": {"uki-secureboot", []int{11}, func(l *Log) {
			l.Events = slices.Delete(l.Events, 28, 30)
		}, []string{
			`PCR 11: kernel command line is gone: was 9936b932d368… (usually a unified kernel image built with another command line)`,
		}},
		"UKI, later in the boot": {"uki-secureboot", []int{11}, func(l *Log) {
			l.Append([]Event{Measure(l.Banks, 11, EventTag, []byte("sysinit"), []byte("sysinit"))})
		}, []string{
			`PCR 11: boot phase is new: sysinit (usually kleidi ran earlier or later in the boot: order its unit After=systemd-pcrphase.service)`,
		}},
		"Secure Boot off": {"uki-secureboot", uki, func(l *Log) {
			remeasureVariable(l, 3, []byte{0})
			l.Events = slices.Delete(l.Events, 21, 22)
		}, []string{
			`PCR 7: Secure Boot changed: was on, now off (usually it was switched on or off in the firmware's setup)`,
		}},
		"Secure Boot off, kernel started by the firmware": {"uki-secureboot", uki, func(l *Log) {
			remeasureVariable(l, 3, []byte{0})
			l.Append([]Event{Measure(l.Banks, 4, EFIBootServicesApp, x, imageLoad{size: 5}.encode())})
		}, []string{
			`PCR 4: kernel is new: loaded from memory, 5 bytes (usually Secure Boot switched on or off: the kernel is then started in another way)`,
			`PCR 7: Secure Boot changed: was on, now off (usually it was switched on or off in the firmware's setup)`,
		}},
		"signed by another key": {"uki-secureboot", uki, func(l *Log) {
			remeasureVariable(l, 21, bytes.Repeat(x, 20))
		}, []string{
			`PCR 7: key that signed the boot program changed: was SnakeOil, now 20 bytes (usually a boot loader or kernel signed by somebody else)`,
		}},
		"dbx of equal size": {"shim-grub-secureboot", grub, func(l *Log) {
			v, _ := parseVariable(l.Events[7].UntrustedData)
			v.data[len(v.data)-1] ^= 1
			remeasureVariable(l, 7, v.data)
		}, []string{
			`PCR 7: list of revoked boot programs (dbx) changed: was 1963d580fcc0…, now 3dd12708ad61… (usually a revocation update, by fwupd or with the firmware)`,
		}},
		"dbx": {"shim-grub-secureboot", grub, func(l *Log) {
			v, _ := parseVariable(l.Events[7].UntrustedData)
			remeasureVariable(l, 7, append(bytes.Clone(v.data), v.data...))
		}, []string{
			`PCR 7: list of revoked boot programs (dbx) changed: was 1 hash, now 2 hashes (usually a revocation update, by fwupd or with the firmware)`,
		}},
		"db": {"shim-grub-secureboot", grub, func(l *Log) { remeasureVariable(l, 6, nil) }, []string{
			`PCR 7: Secure Boot allowed signers (db) changed: was Microsoft Windows Production PCA 2011, Microsoft Corporation UEFI CA 2011, now none (usually keys enrolled, removed or reset in the firmware's setup, or a firmware update)`,
		}},
		"firmware": {"uki-secureboot", []int{0}, func(l *Log) {
			remeasure(l, 0, encodeUTF16("2.1\x00"), encodeUTF16("2.1\x00"))
			remeasure(l, 2, x, nil)
		}, []string{
			`PCR 0: firmware version changed: was 96a296d224f2…, now 2.1 (usually a firmware update)`,
			`PCR 0: firmware (12582912 bytes at 0x900000) changed: was a644ed209b18…, now 2d711642b726… (usually a firmware update, or other firmware settings)`,
		}},
		"GRUB, command line": {"shim-grub-secureboot", grub, func(l *Log) {
			line := "/vmlinuz console=ttyS0,115200 quiet panic=-1 mboot=b"
			remeasure(l, 36, []byte("linux "+line), []byte("grub_cmd: linux "+line+"\x00"))
			remeasure(l, 40, []byte(line), []byte("kernel_cmdline: "+line+"\x00"))
		}, []string{
			`PCR 8: kernel command line changed: was "/vmlinuz console=ttyS0,115200 quiet panic=-1 mboot=a", now "/vmlinuz console=ttyS0,115200 quiet panic=-1 mboot=b" (usually the command line was edited, or a kernel update)`,
		}},
		"GRUB, a command line that the log lies about": {"shim-grub-secureboot", []int{8}, func(l *Log) {
			remeasure(l, 40, []byte("init=/bin/sh"), nil)
		}, []string{
			`PCR 8: kernel command line changed: was "/vmlinuz console=ttyS0,115200 quiet panic=-1 mboot=a", now "/vmlinuz console=ttyS0,115200 quiet panic=-1 mboot=a (claimed, not proven)" (usually the command line was edited, or a kernel update)`,
		}},
		"GRUB, kernel": {"shim-grub-secureboot", grub, func(l *Log) {
			for _, i := range []int{38, 39} {
				remeasure(l, i, x, imageLoad{size: 8255555}.encode())
			}
			remeasure(l, 37, x, []byte("/vmlinuz-6.12.0-3\x00"))
		}, []string{
			`PCR 4: kernel changed: was loaded from memory, 8247232 bytes, now loaded from memory, 8255555 bytes (usually a kernel update, or another kernel chosen in the boot menu)`,
			`PCR 9: kernel changed: was /vmlinuz, now /vmlinuz-6.12.0-3 (usually a kernel update, or another kernel chosen in the boot menu)`,
		}},
		"GRUB, kernel of equal size": {"shim-grub-secureboot", []int{4}, func(l *Log) {
			remeasure(l, 38, x, nil)
			remeasure(l, 39, x, nil)
		}, []string{
			`PCR 4: kernel changed: was 6b1bf35c3bee…, now 2d711642b726… (usually a kernel update, or another kernel chosen in the boot menu)`,
		}},
		"GRUB, one kernel more": {"shim-grub-secureboot", []int{4}, func(l *Log) {
			l.Append([]Event{Measure(l.Banks, 4, EFIBootServicesApp, x, imageLoad{size: 5}.encode())})
		}, []string{
			`PCR 4: kernel is new: loaded from memory, 5 bytes (usually a kernel update, or another kernel chosen in the boot menu)`,
		}},
		"shim": {"shim-grub-secureboot", []int{4}, func(l *Log) { remeasure(l, 23, x, nil) }, []string{
			`PCR 4: boot program (\EFI\BOOT\BOOTX64.EFI) changed: was 80a66d53a945…, now 2d711642b726… (usually a boot loader update)`,
		}},
		"GRUB, initrd": {"shim-grub-secureboot", grub, func(l *Log) { remeasure(l, 42, x, nil) }, []string{
			`PCR 9: initrd (/initrd.gz) changed: was 8bc65108deea…, now 2d711642b726… (usually a rebuilt initrd, after a kernel or driver update)`,
		}},
		"GRUB itself": {"shim-grub-secureboot", grub, func(l *Log) { remeasure(l, 29, x, nil) }, []string{
			`PCR 4: boot loader (\EFI\BOOT\grubx64.efi) changed: was a68f6d71ebdd…, now 2d711642b726… (usually a boot loader update)`,
		}},
		"GRUB, one command more": {"shim-grub-secureboot", grub, func(l *Log) {
			l.Events = slices.Insert(l.Events, 36, Measure(l.Banks, 8, IPL, []byte("set gfxmode=auto"), []byte("grub_cmd: set gfxmode=auto\x00")))
		}, []string{
			`PCR 8: GRUB command is new: "set gfxmode=auto" (usually GRUB's configuration was changed, or another choice in the boot menu)`,
		}},
		"GRUB, one command more and one later": {"shim-grub-secureboot", grub, func(l *Log) {
			moved := l.Events[30]
			l.Events[30] = Measure(l.Banks, 8, IPL, []byte("[ 1 ]"), []byte("grub_cmd: [ 1 ]\x00"))
			l.Events = slices.Insert(l.Events, 36, moved)
		}, []string{
			`PCR 8: GRUB command is new: "[ 1 ]" (usually GRUB's configuration was changed, or another choice in the boot menu)`,
		}},
		"GRUB, commands swapped": {"shim-grub-secureboot", grub, func(l *Log) {
			l.Events[30], l.Events[31] = l.Events[31], l.Events[30]
		}, []string{`PCR 8: the same events came in another order`}},
		"MOK, one list less": {"shim-grub-secureboot", grub, func(l *Log) {
			remeasure(l, 25, x, nil)
			l.Events = slices.Delete(l.Events, 24, 25)
		}, []string{
			`PCR 14: shim's key list is gone: was MokList (usually a key enrolled or removed with mokutil, or a shim update)`,
			`PCR 14: shim's key list (MokListX) changed: was 45e89b4a5f82…, now 2d711642b726… (usually a key enrolled or removed with mokutil, or a shim update)`,
		}},
		"MOK": {"shim-grub-secureboot", grub, func(l *Log) { remeasure(l, 24, x, nil) }, []string{
			`PCR 14: shim's key list (MokList) changed: was 342c88bb9fde…, now 2d711642b726… (usually a key enrolled or removed with mokutil, or a shim update)`,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := compare(t, c.log, c.pcrs, c.edit); !reflect.DeepEqual(got, c.want) {
				t.Errorf("got\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(c.want, "\n  "))
			}
		})
	}
}

func TestCompareWithoutExplanation(t *testing.T) {
	zeros, ones := make([]byte, 32), bytes.Repeat([]byte{0xff}, 32)
	s := parseLog(t, "uki-secureboot").Summarize(crypto.SHA256, []int{4})
	for name, c := range map[string]struct {
		was, now []Summary
		a, b     PCRs
		want     []string
	}{
		"no records":            {nil, nil, PCRs{4: zeros}, PCRs{4: ones}, []string{"PCR 4: value changed: was 000000000000…, now ffffffffffff… (usually no event of it was recorded)"}},
		"equal events":          {s, s, PCRs{4: zeros}, PCRs{4: ones}, []string{"PCR 4: value changed: was 000000000000…, now ffffffffffff… (usually something measured into it without leaving an event in the log)"}},
		"equal values":          {s, nil, PCRs{4: ones}, PCRs{4: ones}, nil},
		"values not given":      {s, s, nil, nil, nil},
		"value of then missing": {s, s, nil, PCRs{4: ones}, nil},
	} {
		var got []string
		for _, d := range Compare(c.was, c.now, c.a, c.b) {
			got = append(got, d.String())
		}
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestCompareIsBounded(t *testing.T) {
	long := func(tag string) []Summary {
		var s []Summary
		for i := range 20000 {
			s = append(s, Summary{8, "EV_IPL", fmt.Sprintf("%s%d", tag, i), fmt.Sprintf("grub_cmd: set \x1b[31m%d%s", i, strings.Repeat(tag, 1000))})
		}
		return s
	}
	start := time.Now()
	got := Compare(long("a"), long("b"), nil, nil)
	if took := time.Since(start); took > 2*time.Minute {
		t.Errorf("took %v", took)
	}
	if len(got) != maxDifferences+1 || got[maxDifferences].String() != "PCR 8: 506 more events differ" {
		t.Errorf("%d differences, the last: %v", len(got), got[len(got)-1])
	}
	for _, d := range got {
		if s := d.String(); len(s) > 1000 || strings.Contains(s, "\x1b") {
			t.Errorf("%d bytes: %q", len(s), s)
		}
	}
}

func TestSummaryReplaysAndSurvivesJSON(t *testing.T) {
	for _, name := range realLogs {
		l, quoted := parseLog(t, name), readPCRs(t, name, crypto.SHA384)
		b, err := json.Marshal(l.Summarize(crypto.SHA384, l.BootType().PCRs(l)))
		if err != nil {
			t.Fatal(err)
		}
		var s []Summary
		if err := json.Unmarshal(b, &s); err != nil {
			t.Fatal(err)
		}
		pcrs, err := ReplaySummary(s, crypto.SHA384, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, pcr := range l.BootType().PCRs(l) {
			if !bytes.Equal(pcrs[pcr], quoted[pcr]) {
				t.Errorf("%s: PCR %d is %x, want %x", name, pcr, pcrs[pcr], quoted[pcr])
			}
		}
		if _, ok := pcrs[0]; ok || len(pcrs) != len(l.BootType().PCRs(l)) {
			t.Errorf("%s: PCRs that were not asked for", name)
		}
	}
}

func TestReplaySummaryRefuses(t *testing.T) {
	digest := strings.Repeat("00", 32)
	for name, s := range map[string]Summary{
		"short":        {PCR: 4, Digest: digest[2:]},
		"not hex":      {PCR: 4, Digest: "zz" + digest[2:]},
		"none":         {PCR: 4},
		"PCR 24":       {PCR: 24, Digest: digest},
		"negative PCR": {PCR: -1, Digest: digest},
	} {
		if _, err := ReplaySummary([]Summary{s}, crypto.SHA256, 0); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := ReplaySummary(nil, SM3, 0); err == nil {
		t.Error("a bank that Go can't compute: accepted")
	}
	l := bootWith(Informational(sha256Only, 0, []byte(startupLocality+"\x03")), Measure(sha256Only, 0, CRTMVersion, nil, nil))
	want, err := l.Replay(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ReplaySummary(l.Summarize(crypto.SHA256, allPCRs), crypto.SHA256, 3)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("with a locality: %x, %v, want %x", got, err, want)
	}
}

// checkWhat checks the promise of Summary.What.
func checkWhat(t *testing.T, s Summary) {
	t.Helper()
	if n := utf8.RuneCountInString(s.What); n > maxWhat || !utf8.ValidString(s.What) ||
		strings.ContainsFunc(s.What, func(r rune) bool { return !unicode.IsPrint(r) }) {
		t.Errorf("%d runes: %q", n, s.What)
	}
}

func TestWhatIsPrintableAndBounded(t *testing.T) {
	for data, want := range map[string]string{
		"grub_cmd: a\x1b[2Jb\x00":                "grub_cmd: a?[2Jb",
		"kernel_cmdline: a\u202eb\n\tc\x00":      "kernel_cmdline: a?b c",
		"kernel_cmdline: " + "\xff\xfe" + "\x00": "kernel_cmdline: ?",
		string(encodeUTF16("console=tty\x00")):   "console=tty",
		"\x01\x02\x03":                           "3 bytes",
		"":                                       "0 bytes",
		"kernel_cmdline: x" + strings.Repeat("é", 500) + "end=1\x00": "kernel_cmdline: x" + strings.Repeat("é", 89) + "…" + strings.Repeat("é", 48) + "end=1",
	} {
		_, text := splitGRUB([]byte(data))
		if text == nil {
			text = []byte(data)
		}
		s := bootWith(Measure(sha256Only, 8, IPL, text, []byte(data))).Summarize(crypto.SHA256, []int{8})[0]
		checkWhat(t, s)
		if s.What != want {
			t.Errorf("%q: %q, want %q", data, s.What, want)
		}
	}
	eachPublicLog(t, func(t *testing.T, raw []byte, refusal string) {
		if refusal != "" {
			return
		}
		l, err := Parse(raw)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range l.Summarize(l.Banks[0], allPCRs) {
			checkWhat(t, s)
		}
	})
}
