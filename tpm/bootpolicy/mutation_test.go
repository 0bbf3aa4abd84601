package bootpolicy

import (
	"crypto"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// mutations of one real log are tried in each of the tests below; e2e/mutate tries more.
const mutations = 10_000

// mutate changes a log in one way.
func mutate(r *rand.Rand, l *eventlog.Log) {
	n := len(l.Events)
	if n == 0 {
		return
	}
	i, k := r.IntN(n), r.IntN(n)
	e := &l.Events[i]
	switch r.IntN(15) {
	case 0:
		d := e.Digests[r.IntN(len(e.Digests))].Value
		d[r.IntN(len(d))] ^= 1 << r.IntN(8)
	case 1:
		remove(l, i)
	case 2:
		insert(l, k, l.Events[i])
	case 3:
		l.Events[i], l.Events[k] = l.Events[k], l.Events[i]
	case 4:
		e.PCR = r.IntN(eventlog.NumPCRs)
	case 5:
		e.UntrustedType = l.Events[k].UntrustedType
	case 6:
		e.UntrustedData = l.Events[k].UntrustedData
	case 7:
		if len(e.UntrustedData) > 0 {
			e.UntrustedData = slices.Clone(e.UntrustedData)
			e.UntrustedData[r.IntN(len(e.UntrustedData))] ^= 1 << r.IntN(8)
		}
	case 8:
		e.UntrustedType = eventlog.NoAction
	case 9:
		e.Digests = slices.Clone(l.Events[k].Digests)
	case 10:
		removeAll(l, r.IntN(16))
	case 11:
		insert(l, i, eventlog.Informational(l.Banks, 0, append([]byte("StartupLocality\x00"), byte(r.IntN(6)))))
	case 12:
		insert(l, i, measure(l, r.IntN(16), eventlog.Separator, zeros, zeros))
	case 13:
		text := string(l.Events[k].UntrustedData)
		insert(l, i, measure(l, r.IntN(16), l.Events[k].UntrustedType, text, text))
	case 14:
		insert(l, i, eventlog.Event{PCR: e.PCR, UntrustedType: e.UntrustedType, Digests: e.Digests, UntrustedData: []byte(strings.Repeat("A", r.IntN(64)))})
	}
}

// TestMutatedLogs: a mutated log is accepted only if the digests of the judged PCRs,
// and their order, are still those of the recorded log. This holds with the recorded
// boot's quote (the log lies) and with a quote that fits the mutated log (the machine
// really booted this way).
func TestMutatedLogs(t *testing.T) {
	for _, name := range realLogs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			honest := realLog(t, name)
			p := record(t, honest, honest.BootType().PCRs(honest))
			p.PCRs[0] = record(t, honest, []int{0}).PCRs[0]
			want, truth := digests(honest, p.Demanded()), booted(t, p, honest)
			r := rand.New(rand.NewPCG(1, 2))
			accepted := 0
			for range mutations {
				l := deepCopy(honest)
				for range 1 + r.IntN(3) {
					mutate(r, l)
				}
				quoted := truth
				if r.IntN(4) > 0 {
					var err error
					if quoted, err = p.Claimed(l); err != nil {
						quoted = truth
					}
				}
				if !Judge(p, l, quoted).Accepted {
					continue
				}
				accepted++
				if !sameDigests(digests(l, p.Demanded()), want) {
					t.Fatalf("accepted, with other digests than recorded:\n%v", Explain(l, crypto.SHA256))
				}
			}
			if accepted == 0 || accepted == mutations {
				t.Errorf("%d of %d accepted: the test shows nothing", accepted, mutations)
			}
			t.Logf("%d of %d accepted, with the recorded digests", accepted, mutations)
		})
	}
}

// TestMutatedBytes is TestMutatedLogs for logs that are changed before they are parsed.
func TestMutatedBytes(t *testing.T) {
	for _, name := range realLogs {
		raw, honest := rawLog(t, name), realLog(t, name)
		p := record(t, honest, judged(honest))
		want := digests(honest, p.Demanded())
		r := rand.New(rand.NewPCG(3, 4))
		for range mutations / 40 {
			b := slices.Clone(raw)
			b[r.IntN(len(b))] ^= 1 << r.IntN(8)
			judgeBytes(t, p, b, want)
		}
	}
}

// judgeBytes judges a log by the quote that it claims.
func judgeBytes(t *testing.T, p *BootPolicy, raw []byte, want map[int][]string) {
	l, err := eventlog.Parse(raw)
	if err != nil {
		return
	}
	quoted, err := p.Claimed(l)
	if err != nil {
		return
	}
	if v := Judge(p, l, quoted); v.Accepted && !sameDigests(digests(l, p.Demanded()), want) {
		t.Fatal("accepted, with other digests than recorded")
	} else if !v.Accepted {
		_ = v.Err().Error()
	}
	Explain(l, crypto.SHA256)
	if other, err := Record(l, crypto.SHA256, p.Demanded()); err == nil {
		if v := Judge(other, l, quoted); !v.Accepted {
			t.Fatalf("what was recorded is refused: %v", v.Err())
		}
		Diff(p, other)
	}
}

// smallLog is a boot in few bytes, so that fuzzing is quick.
func smallLog() *eventlog.Log {
	l := &eventlog.Log{Banks: []crypto.Hash{crypto.SHA256}}
	on, signer := variable(globalGUID, "SecureBoot", "\x01"), variable(securityGUID, "db", strings.Repeat("o", 16)+otherCertificate)
	l.Append([]eventlog.Event{
		measure(l, 0, eventlog.CRTMVersion, wide("F2\x00"), wide("F2\x00")),
		measure(l, 7, eventlog.EFIVariableDriverConfig, on, on),
		measure(l, 7, eventlog.Separator, zeros, zeros),
		measure(l, 0, eventlog.Separator, zeros, zeros),
		measure(l, 7, eventlog.EFIVariableAuthority, signer, signer),
		measure(l, 8, eventlog.IPL, "linux /k ro", "grub_cmd: linux /k ro\x00"),
		measure(l, 8, eventlog.IPL, "/k ro", "kernel_cmdline: /k ro\x00"),
	})
	return l
}

func FuzzJudge(f *testing.F) {
	honest := smallLog()
	f.Add(honest.Encode())
	p := record(f, honest, []int{0, 7, 8})
	want := digests(honest, p.Demanded())
	loose := record(f, honest, []int{0, 7, 8})
	loose.PCRs[8] = Rule{Allowed: []Entry{{Form: FormCommandLine, Value: "ro"}}}
	loose.PCRs[7] = Rule{Any: true}
	f.Fuzz(func(t *testing.T, raw []byte) {
		judgeBytes(t, p, raw, want)
		l, err := eventlog.Parse(raw)
		if err != nil {
			return
		}
		if quoted, err := loose.Claimed(l); err == nil && Judge(loose, l, quoted).Accepted {
			for _, e := range l.Events {
				if e.PCR == 8 && e.UntrustedType != eventlog.NoAction && !strings.HasSuffix(string(e.UntrustedData), " ro") && !strings.HasSuffix(string(e.UntrustedData), " ro\x00") {
					t.Errorf("accepted: %q", e.UntrustedData)
				}
			}
		}
	})
}

// TestLargestLog: the largest log and the largest boot policy are judged in time
// and memory in proportion to them; a product of both would take hours.
func TestLargestLog(t *testing.T) {
	l := &eventlog.Log{Banks: []crypto.Hash{crypto.SHA256}}
	for range eventlog.MaxEvents {
		l.Events = append(l.Events, measure(l, 8, eventlog.IPL, "linux /k evil", "grub_cmd: linux /k evil"))
	}
	var entries []Entry
	var sequences [][]Entry
	for range MaxEntries / 2 {
		entries = append(entries, Entry{Form: FormText, Value: strings.Repeat("a", 200)})
		sequences = append(sequences, []Entry{{Form: FormCommandLine, Value: "good"}})
	}
	for name, r := range map[string]Rule{"allowed": {Allowed: entries}, "sequences": {Sequences: sequences[:MaxEntries/4]}, "one sequence": {Sequences: [][]Entry{entries}}} {
		p := &BootPolicy{APIVersion: APIVersion, Kind: Kind, Bank: "sha256", PCRs: map[int]Rule{8: r}}
		v := Judge(p, l, booted(t, p, l))
		if v.Accepted || len(v.Findings) != maxFindings || v.More == 0 {
			t.Errorf("%s: %d findings and %d more", name, len(v.Findings), v.More)
		}
	}
}

func TestUnjudgedIsRefused(t *testing.T) {
	l := realLog(t, "direct-kernel")
	for name, v := range map[string]*Verdict{
		"no verdict":         {},
		"empty boot policy":  Judge(&BootPolicy{}, l, eventlog.PCRs{}),
		"nothing to compare": Judge(&BootPolicy{APIVersion: APIVersion, Kind: Kind, Bank: "sha256"}, l, eventlog.PCRs{}),
		"empty log":          Judge(record(t, l, []int{4}), &eventlog.Log{}, nil),
		"nothing quoted":     Judge(record(t, l, []int{4}), l, nil),
	} {
		if v.Accepted || v.Err() == nil || v.Err().Error() == "" {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestDifferences: the differences found turn one list into the other, and only equal
// lists have none.
func TestDifferences(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 20_000 {
		a, b := make([]int, r.IntN(8)), make([]int, r.IntN(8))
		for _, list := range [][]int{a, b} {
			for i := range list {
				list[i] = r.IntN(3)
			}
		}
		pairs := differences(len(a), len(b), func(i, k int) bool { return a[i] == b[k] })
		if (len(pairs) == 0) != slices.Equal(a, b) {
			t.Fatalf("%v, %v: %v", a, b, pairs)
		}
		var gone, added []int
		for _, p := range pairs {
			if p.a >= 0 {
				gone = append(gone, p.a)
			}
			if p.b >= 0 {
				added = append(added, p.b)
			}
		}
		rest := func(list, without []int) (out []int) {
			for i, v := range list {
				if !slices.Contains(without, i) {
					out = append(out, v)
				}
			}
			return out
		}
		if !slices.Equal(rest(a, gone), rest(b, added)) {
			t.Fatalf("%v, %v: %v leave different rests", a, b, pairs)
		}
	}
}
