package bootpolicy

import (
	"crypto"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

var update = flag.Bool("update", false, "write the golden files again")

// golden compares with a file of testdata.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("%s differs; look at it, and write it again with go test -update:\n%s", path, got)
	}
}

func TestRecordedBootIsAccepted(t *testing.T) {
	for _, name := range realLogs {
		for _, bank := range []crypto.Hash{crypto.SHA256, crypto.SHA384} {
			t.Run(name+"/"+eventlog.BankName(bank), func(t *testing.T) {
				l := realLog(t, name)
				p, err := Record(l, bank, judged(l))
				if err != nil {
					t.Fatal(err)
				}
				b := p.Marshal()
				if bank == crypto.SHA256 {
					golden(t, name+".yaml", b)
				}
				again, err := Parse(b)
				if err != nil {
					t.Fatal(err)
				}
				if !reflect.DeepEqual(p, again) || string(again.Marshal()) != string(b) || len(Diff(p, again)) > 0 {
					t.Errorf("it reads back as another:\n%s", again.Marshal())
				}
				if v := Judge(again, l, quote(t, name, bank, p.Demanded())); !v.Accepted {
					t.Errorf("refused: %v", v.Err())
				}
			})
		}
	}
}

func TestRecordRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		bank crypto.Hash
		pcrs []int
		edit func(t *testing.T, l *eventlog.Log)
		want string
	}{
		"SHA-1":        {crypto.SHA1, []int{4}, nil, "choose sha256 or sha384"},
		"no PCR":       {crypto.SHA256, nil, nil, "names no PCR"},
		"PCR 16":       {crypto.SHA256, []int{16}, nil, "can be reset"},
		"PCR -1":       {crypto.SHA256, []int{-1}, nil, "does not exist"},
		"missing bank": {crypto.SHA384, []int{4}, func(_ *testing.T, l *eventlog.Log) { *l = *l.Only(crypto.SHA256) }, "no sha384 digest"},
		"error in the firmware": {crypto.SHA256, []int{4}, func(t *testing.T, l *eventlog.Log) {
			l.Events[find(t, l, 4, "separator")] = measure(l, 4, eventlog.Separator, errorData, errorData)
		}, "could not measure"},
		"two separators": {crypto.SHA256, []int{4}, func(_ *testing.T, l *eventlog.Log) {
			l.Append([]eventlog.Event{measure(l, 4, eventlog.Separator, zeros, zeros)})
		}, "do not end once"},
		"too many events": {crypto.SHA256, []int{9}, func(_ *testing.T, l *eventlog.Log) {
			for range MaxEntries + 1 {
				l.Append(l.Events[:1:1])
				l.Events[len(l.Events)-1].PCR = 9
			}
		}, "more than 4096"},
		"too many bytes": {crypto.SHA256, []int{9}, func(_ *testing.T, l *eventlog.Log) {
			e := measure(l, 9, eventlog.IPL, "x", strings.Repeat("長", maxNote))
			for range MaxEntries - 10 {
				l.Append([]eventlog.Event{e})
			}
		}, "more than 1048576"},
	} {
		t.Run(name, func(t *testing.T) {
			l := realLog(t, "uki-secureboot")
			if c.edit != nil {
				c.edit(t, l)
			}
			if p, err := Record(l, c.bank, c.pcrs); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, %v; want %s", p, err, c.want)
			}
		})
	}
}

func TestRecordWithoutSeparators(t *testing.T) {
	l := realLog(t, "direct-kernel")
	removeAll(l, 3)
	p := record(t, l, []int{3, 4})
	if s := p.PCRs[3].Separator; s == nil || *s || p.PCRs[4].Separator != nil {
		t.Errorf("%s", p.Marshal())
	}
}

// TestRecordedVersions: a version is recorded as text only if it is one that a person
// can read and that gives the digest.
func TestRecordedVersions(t *testing.T) {
	long := strings.Repeat("v", maxText)
	for name, c := range map[string]struct {
		measured, data string
		want           []string
	}{
		"text":               {"1.42", "1.42", []string{"1.42"}},
		"with its zero":      {"1.42\x00", "1.42\x00", []string{"1.42"}},
		"wide":               {wide("1.42"), wide("1.42"), []string{"1.42"}},
		"wide, with a zero":  {wide("1.42\x00"), wide("1.42\x00"), []string{"1.42"}},
		"empty":              {"", "", []string{""}},
		"the longest":        {long, long, []string{long}},
		"the longest, wide":  {wide(long), wide(long), []string{long}},
		"too long":           {long + "v", long + "v", nil},
		"too long, wide":     {wide(long + "v"), wide(long + "v"), nil},
		"other than its log": {"1.42", "1.43", nil},
		"a GUID":             {"\x12\x93\xc5\x01\xfe\x00\x88\x99\x1b\x02\x77\xd8\x40\xe1\x05\xa0", "\x12\x93\xc5\x01\xfe\x00\x88\x99\x1b\x02\x77\xd8\x40\xe1\x05\xa0", nil},
		"not UTF-8":          {"1.42\xff", "1.42\xff", nil},
		"not printable":      {"1.4\x1b[2J", "1.4\x1b[2J", nil},
		"the rune of errors": {"1.4\ufffdx", "1.4\ufffdx", nil},
		"half of a pair":     {wide("1.4") + "\x00\xd8", wide("1.4") + "\x00\xd8", nil},
	} {
		l := realLog(t, "uki-secureboot")
		l.Events[find(t, l, 0, "firmware version")] = measure(l, 0, eventlog.CRTMVersion, c.measured, c.data)
		if p := record(t, l, []int{0}); !reflect.DeepEqual(p.Firmware.Versions, c.want) {
			t.Errorf("%s: %q", name, p.Firmware.Versions)
		}
	}
}

// TestNotesAreHarmless: a log's text ends up in comments, whatever it is.
func TestNotesAreHarmless(t *testing.T) {
	for _, evil := range []string{"x\nsecureBoot: disabled", "# # x", "\x1b[2J", "\u202eevil", strings.Repeat("長", 400), "\xff\xfe", "\u2028pcrs: {}", "'\"", ": - [", "\r\n- y", "\u0085z", "\ufeff"} {
		l := &eventlog.Log{Banks: []crypto.Hash{crypto.SHA256}}
		for _, typ := range []eventlog.EventType{eventlog.IPL, eventlog.EventTag, eventlog.CRTMVersion, eventlog.EFIAction} {
			l.Append([]eventlog.Event{measure(l, 0, typ, evil, evil), measure(l, 0, typ, wide(evil), wide(evil)), measure(l, 9, typ, evil, "kernel_cmdline: "+evil)})
		}
		p := record(t, l, []int{0, 9})
		again, err := Parse(p.Marshal())
		if err != nil || !reflect.DeepEqual(p, again) {
			t.Errorf("%q: %v\n%s", evil, err, p.Marshal())
		}
	}
}

func TestExplain(t *testing.T) {
	for _, name := range realLogs {
		l := realLog(t, name)
		insert(l, 0, eventlog.Informational(l.Banks, 0, []byte("StartupLocality\x00\x03")), eventlog.Informational(l.Banks, eventlog.NoPCR, []byte("SP800-155 Event\x00\x01")),
			eventlog.Informational(l.Banks, 4, []byte("\x1b[2J")))
		var b strings.Builder
		for _, r := range Explain(l, crypto.SHA256) {
			fmt.Fprintf(&b, "%d\t%d\t%s\t%s\t%s\t%s\n", r.Event, r.PCR, r.UntrustedType, r.Short(), r.What, r.Backed)
		}
		golden(t, name+".txt", []byte(b.String()))
	}
}

// TestExplainBelievesNothing: data whose hash is not the digest is a claim.
func TestExplainBelievesNothing(t *testing.T) {
	for _, name := range realLogs {
		l := realLog(t, name)
		for i := range l.Events {
			l.Events[i].Digest(crypto.SHA256)[31] ^= 1
		}
		for _, r := range Explain(l, crypto.SHA256) {
			if r.Backed != BackedByNothing {
				t.Errorf("%s: %+v", name, r)
			}
		}
	}
}
