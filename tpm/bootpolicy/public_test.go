package bootpolicy

import (
	"crypto"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// publicLogs calls f with each log that other projects test with and that package
// eventlog reads (those of TPM 1.2 it refuses, as its own tests say).
func publicLogs(t *testing.T, f func(t *testing.T, name string, l *eventlog.Log)) {
	t.Helper()
	n := 0
	files, err := filepath.Glob("../eventlog/testdata/public/*/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if l, err := eventlog.Parse(raw); err == nil {
			n++
			t.Run(filepath.Base(file), func(t *testing.T) { f(t, filepath.Base(file), l) })
		}
	}
	if n < 17 {
		t.Errorf("only %d public logs were read", n)
	}
}

// withoutSeparator are PCRs of which no separator is demanded, because something else
// has the same bytes, or because there is none.
var withoutSeparator = map[string][]int{
	"glinux-alex.bin": {0}, // four zeros as S-CRTM contents
	"confidential-gke-debug-251000_eventlog.bin": {1}, // BootOrder 0001, 0000
	"eventlogwithsp800155.bin":                   {1},
	"sb_cert_eventlog":                           {0, 1, 2, 3, 4, 5, 6}, // a log of PCR 7 alone
}

// TestPublicBootsCanBeRecorded: every boot of a real machine's firmware can be
// recorded. The boot policy reads back, accepts that boot, and refuses it with one
// digest changed.
func TestPublicBootsCanBeRecorded(t *testing.T) {
	pcrs := []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15}
	publicLogs(t, func(t *testing.T, name string, l *eventlog.Log) {
		for _, bank := range []crypto.Hash{crypto.SHA256, crypto.SHA384} {
			if !slices.Contains(l.Banks, bank) {
				continue
			}
			p, err := Record(l, bank, pcrs)
			if err != nil {
				t.Fatal(err)
			}
			again, err := Parse(p.Marshal())
			if err != nil || !reflect.DeepEqual(p, again) {
				t.Fatalf("it reads back as another: %v", err)
			}
			if v := Judge(again, l, booted(t, again, l)); !v.Accepted {
				t.Errorf("refused: %v", v.Err())
			}
			for pcr := range lastSeparated + 1 {
				s := p.PCRs[pcr].Separator
				if want := slices.Contains(withoutSeparator[name], pcr); (s != nil && !*s) != want {
					t.Errorf("PCR %d: separator is left out: %v", pcr, !want)
				}
			}
			eachChanged(t, again, l)
		}
	})
}

// eachChanged demands that every judged event matters, on a machine that really booted
// in this way.
func eachChanged(t *testing.T, p *BootPolicy, l *eventlog.Log) {
	t.Helper()
	for i, e := range l.Events {
		if _, judged := p.PCRs[e.PCR]; !judged || e.UntrustedType == eventlog.NoAction {
			continue
		}
		d := e.Digest(p.Hash())
		d[0] ^= 1
		if Judge(p, l, booted(t, p, l)).Accepted {
			t.Errorf("event %d, changed, is accepted", i)
		}
		d[0] ^= 1
	}
}

// TestRecordWithALookalike: if an event measures the bytes of a separator, its PCR gets
// no separator rule, but the list still contains the event.
func TestRecordWithALookalike(t *testing.T) {
	for name, data := range map[string]string{"of an error": errorData, "of four zeros": zeros} {
		l := realLog(t, "uki-secureboot")
		i := find(t, l, 1, "BootOrder")
		l.Events[i] = measure(l, 1, eventlog.EFIVariableBoot, data, variable(globalGUID, "BootOrder", data))
		p := record(t, l, []int{1, 2})
		if s := p.PCRs[1].Separator; s == nil || *s || p.PCRs[2].Separator != nil {
			t.Errorf("%s:\n%s", name, p.Marshal())
		}
		for what, forge := range map[string]func(){
			"another": func() {
				l.Append([]eventlog.Event{measure(l, 1, eventlog.EFIVariableBoot, data, data)})
			},
			"none": func() {
				l.Events = slices.DeleteFunc(l.Events, func(e eventlog.Event) bool { return string(e.UntrustedData) == zeros && e.PCR == 1 })
			},
		} {
			honest := slices.Clone(l.Events)
			forge()
			if Judge(p, l, booted(t, p, l)).Accepted {
				t.Errorf("%s: %s is accepted", name, what)
			}
			l.Events = honest
		}
	}
}
