package attest_test

import (
	"bytes"
	"crypto"
	"slices"
	"strings"
	"testing"

	goattest "github.com/google/go-attestation/attest"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// gateDemand is what the boot policy of these tests demands.
var gateDemand = demand{nonce, crypto.SHA256, []int{0, 4, 7, 11}}

// gate runs all checks between evidence and a slot: the quote, both replays, and the
// boot policy.
func (d demand) gate(e *attest.Evidence, p *bootpolicy.BootPolicy) error {
	r, err := d.result(e)
	if err != nil {
		return err
	}
	return bootpolicy.Judge(p, r.Log, r.PCRs).Err()
}

// booted returns the evidence of a machine with the boot that change makes of the log.
// The quote matches, by a forger's key, so no replay refuses it.
func booted(t *testing.T, e *attest.Evidence, change func(*eventlog.Log)) *attest.Evidence {
	t.Helper()
	edited := edit(t, e, change)
	events, err := eventlog.ParseUserspace(edited.UserspaceLog)
	if err != nil {
		t.Fatal(err)
	}
	log, err := eventlog.Parse(edited.FirmwareLog)
	if err != nil {
		t.Fatal(err)
	}
	log.Append(events)
	values, err := log.Replay(e.Quote.Bank)
	if err != nil {
		t.Fatal(err)
	}
	return forge(t, edited, func(f *forger) {
		for pcr := range f.quote.PCRs {
			if f.quote.PCRs[pcr] = values[pcr]; values[pcr] == nil {
				f.quote.PCRs[pcr] = make([]byte, e.Quote.Bank.Size())
			}
		}
		f.digest(gateDemand.pcrs...)
	})
}

// first returns the index of a PCR's first event of a type.
func first(t *testing.T, l *eventlog.Log, pcr int, typ eventlog.EventType) int {
	t.Helper()
	i := slices.IndexFunc(l.Events, func(e eventlog.Event) bool { return e.PCR == pcr && e.UntrustedType == typ })
	if i < 0 {
		t.Fatalf("no %s in PCR %d", typ, pcr)
	}
	return i
}

// secureBootOff changes the variable as firmware measures it while it is off.
func secureBootOff(t *testing.T, l *eventlog.Log) {
	t.Helper()
	for i, e := range l.Events {
		if v := e.UntrustedData; e.PCR == 7 && bytes.HasSuffix(v, []byte("t\x00\x01")) && e.Proves(v) {
			off := append(v[:len(v)-1:len(v)-1], 0)
			l.Events[i] = eventlog.Measure(l.Banks, 7, e.UntrustedType, off, off)
			return
		}
	}
	t.Fatal("no variable SecureBoot that is on")
}

// anything accepts everything in these PCRs, so that another rule must refuse.
func anything(pcrs ...int) func(*bootpolicy.BootPolicy) {
	return func(p *bootpolicy.BootPolicy) {
		for _, pcr := range pcrs {
			p.PCRs[pcr] = bootpolicy.Rule{Any: true}
		}
	}
}

// saidBefore is honest evidence, and further evidence of the same machine.
type saidBefore struct {
	honest, earlier, otherPCRs, otherBank *attest.Evidence
	later                                 *attest.Evidence // after one more boot phase
}

// rule is a rule of the gate, with a forgery that breaks only that rule.
type rule struct {
	rule   string
	policy func(*bootpolicy.BootPolicy)
	forge  func(t *testing.T, s saidBefore) *attest.Evidence
	says   string // "" if the gate accepts the evidence
}

// lying edits only the log.
func lying(change func(*eventlog.Log)) func(*testing.T, saidBefore) *attest.Evidence {
	return func(t *testing.T, s saidBefore) *attest.Evidence { return edit(t, s.honest, change) }
}

// otherwise is a machine that really booted in this way.
func otherwise(change func(t *testing.T, l *eventlog.Log)) func(*testing.T, saidBefore) *attest.Evidence {
	return func(t *testing.T, s saidBefore) *attest.Evidence {
		return booted(t, s.honest, func(l *eventlog.Log) { change(t, l) })
	}
}

// withoutUserspace drops systemd's log.
func withoutUserspace(_ *testing.T, s saidBefore) *attest.Evidence {
	e := *s.honest
	e.UserspaceLog = nil
	return &e
}

var four = []byte{0, 0, 0, 0}

// gateRules has a row for each rule of the gate, and for each known trap of other
// implementations. TestForgedQuote, TestForgedLog and package bootpolicy have more rows
// for each.
var gateRules = []rule{
	{rule: "honest evidence passes", forge: func(_ *testing.T, s saidBefore) *attest.Evidence { return s.honest }},
	{rule: "a fresh key: one that its TPM made and that signs TPMs' statements only", says: "attestation key: ",
		forge: func(t *testing.T, s saidBefore) *attest.Evidence {
			return forge(t, s.honest, func(f *forger) { f.public.ObjectAttributes.Restricted = false })
		}},
	{rule: "a fresh nonce: an earlier quote is no answer", says: "quote: it is not fresh",
		forge: func(_ *testing.T, s saidBefore) *attest.Evidence { return s.earlier }},
	{rule: "exactly the demanded PCRs", says: "quote: it is not over exactly the demanded PCRs",
		forge: func(_ *testing.T, s saidBefore) *attest.Evidence { return s.otherPCRs }},
	{rule: "exactly the demanded bank", says: "quote: it is over another PCR bank",
		forge: func(_ *testing.T, s saidBefore) *attest.Evidence { return s.otherBank }},
	{rule: "the values are those quoted", says: "quote: ",
		forge: func(t *testing.T, s saidBefore) *attest.Evidence {
			e := forge(t, s.honest, func(*forger) {})
			e.Quote.PCRs[11] = make([]byte, 32)
			return e
		}},
	{rule: "the log leads to the values", says: "does not lead to the quoted value of PCR 4",
		forge: lying(func(l *eventlog.Log) { l.Events = slices.Delete(l.Events, last(l, 4), last(l, 4)+1) })},
	{rule: "both logs: what user space measured belongs to it", says: "does not lead to the quoted value of PCR 11", forge: withoutUserspace},
	{rule: "a PCR that was extended has events, though others are content with none", says: "no event at all for PCR 7",
		forge: lying(func(l *eventlog.Log) {
			l.Events = slices.DeleteFunc(l.Events, func(e eventlog.Event) bool { return e.PCR == 7 })
		})},
	{rule: "a PCR without events has its first value", policy: anything(11), says: "no event at all for PCR 11",
		forge: func(t *testing.T, s saidBefore) *attest.Evidence {
			s.honest = withoutUserspace(t, s)
			return edit(t, s.honest, func(l *eventlog.Log) {
				l.Events = slices.DeleteFunc(l.Events, func(e eventlog.Event) bool { return e.PCR == 11 })
			})
		}},
	{rule: "the quoted bank is replayed, though another one fits", says: "does not lead to the quoted value of PCR 7",
		forge: lying(func(l *eventlog.Log) { alter(l.Events[last(l, 7)], crypto.SHA256) })},
	{rule: "other banks prove nothing and disturb nothing",
		forge: lying(func(l *eventlog.Log) { alter(l.Events[last(l, 7)], crypto.SHA1) })},
	{rule: "types are untrusted: EV_NO_ACTION hides nothing", says: "EV_NO_ACTION with a digest that is not zeros",
		forge: lying(func(l *eventlog.Log) { l.Events[last(l, 4)].UntrustedType = eventlog.NoAction })},
	{rule: "types are untrusted: EV_NO_ACTION without its digest hides nothing", says: "does not lead to the quoted value of PCR 4",
		forge: lying(func(l *eventlog.Log) {
			i := last(l, 4)
			l.Events[i] = eventlog.Informational(l.Banks, 4, l.Events[i].UntrustedData)
		})},
	{rule: "data is untrusted: a digest decides", says: "pcrs.4.sequences[0]",
		forge: otherwise(func(_ *testing.T, l *eventlog.Log) {
			i := last(l, 4)
			e := l.Events[i]
			l.Events[i] = eventlog.Measure(l.Banks, 4, e.UntrustedType, []byte("rootkit"), e.UntrustedData)
		})},
	{rule: "data is untrusted: lies about the right digests change nothing",
		forge: lying(func(l *eventlog.Log) {
			i := last(l, 4)
			l.Events[i].UntrustedType, l.Events[i].UntrustedData = eventlog.EFIBootServicesApp, []byte("rootkit")
		})},
	{rule: "exactly one separator: a second one", policy: anything(4), says: "pcrs.4.separator",
		forge: otherwise(func(_ *testing.T, l *eventlog.Log) {
			l.Append([]eventlog.Event{eventlog.Measure(l.Banks, 4, eventlog.Separator, four, four)})
		})},
	{rule: "exactly one separator: a second one by another name", policy: anything(4), says: "pcrs.4.separator",
		forge: otherwise(func(_ *testing.T, l *eventlog.Log) {
			l.Append([]eventlog.Event{eventlog.Measure(l.Banks, 4, eventlog.IPL, four, []byte("nothing of interest"))})
		})},
	{rule: "exactly one separator: none", policy: anything(4), says: "pcrs.4.separator",
		forge: otherwise(func(t *testing.T, l *eventlog.Log) {
			i := first(t, l, 4, eventlog.Separator)
			l.Events = slices.Delete(l.Events, i, i+1)
		})},
	{rule: "unknown means no: an event that no entry names", says: "pcrs.4.sequences[0]: event is new",
		forge: otherwise(func(_ *testing.T, l *eventlog.Log) {
			l.Append([]eventlog.Event{eventlog.Measure(l.Banks, 4, eventlog.EventType(99), []byte("x"), nil)})
		})},
	{rule: "unknown means no: a state of Secure Boot that nothing proves", policy: anything(7), says: "secureBoot: PCR 7 does not prove",
		forge: otherwise(func(_ *testing.T, l *eventlog.Log) {
			for i, e := range l.Events {
				if e.PCR == 7 && bytes.HasSuffix(e.UntrustedData, []byte("t\x00\x01")) {
					l.Events[i].UntrustedData = nil
				}
			}
		})},
	{rule: "Secure Boot off", policy: anything(7), says: "secureBoot: Secure Boot is in another state", forge: otherwise(secureBootOff)},
	{rule: "our own parser decides: go-attestation accepts EV_NO_ACTION with a digest", says: "firmware event log: ", forge: theyAccept(func(raw []byte) []byte {
		return append(raw, eventOf(7, eventlog.NoAction)...)
	})},
	{rule: "an event in a PCR that no TPM has extends nothing", forge: theyAccept(func(raw []byte) []byte {
		return append(raw, eventOf(30, eventlog.IPL)...)
	})},
	{rule: "an event that claims another PCR than it was extended into", says: "does not lead to the quoted value of PCR 4",
		forge: lying(func(l *eventlog.Log) { l.Events[last(l, 4)].PCR = 24 })},
	{rule: "an event may lack a bank that was not quoted",
		forge: lying(func(l *eventlog.Log) { l.Events[last(l, 4)] = only(l.Events[last(l, 4)], crypto.SHA256) })},
	{rule: "no event may lack the quoted bank", says: "has no sha256 digest",
		forge: lying(func(l *eventlog.Log) { l.Events[last(l, 4)] = only(l.Events[last(l, 4)], crypto.SHA384) })},
	{rule: "no event may lack the quoted bank, of a PCR that was not quoted either", says: "has no sha256 digest",
		forge: lying(func(l *eventlog.Log) { l.Events[last(l, 5)] = only(l.Events[last(l, 5)], crypto.SHA384) })},
	{rule: "a startup locality may be in an entry larger than its structure", policy: locality3,
		forge: otherwise(func(_ *testing.T, l *eventlog.Log) { l.Events = slices.Insert(l.Events, 0, padded(l, 3)) })},
	{rule: "a startup locality in such an entry is proven by PCR 0", policy: locality3, says: "does not lead to the quoted value of PCR 0",
		forge: lying(func(l *eventlog.Log) { l.Events = slices.Insert(l.Events, 0, padded(l, 3)) })},
	{rule: "record separators in a row stand for nothing",
		forge: func(_ *testing.T, s saidBefore) *attest.Evidence {
			e := *s.honest
			e.UserspaceLog = bytes.ReplaceAll(e.UserspaceLog, []byte{0x1e}, []byte("\x1e\x1e\n\x1e"))
			return &e
		}},
	{rule: "go-attestation must agree", says: "go-attestation's replay disagrees",
		forge: lying(func(l *eventlog.Log) {
			l.Events = slices.Insert(l.Events, 0, eventlog.Informational(l.Banks, 0, []byte("StartupLocality!\x03")))
		})},
	{rule: "the locality that PCR 0 begins with is said once, and first", says: "startup locality given twice",
		forge: lying(func(l *eventlog.Log) { l.Append([]eventlog.Event{locality(l, 0)}) })},
	{rule: "a TPM that was reset behind the firmware's back starts from another locality", policy: anything(0), says: "firmware.startupLocality",
		forge: otherwise(func(_ *testing.T, l *eventlog.Log) { l.Events = slices.Insert(l.Events, 0, locality(l, 3)) })},
	{rule: "an SM3 bank, at which others refuse a whole log, hides no event", says: "does not lead to the quoted value of PCR 11",
		forge: lying(func(l *eventlog.Log) {
			l.Banks = append(slices.Clone(l.Banks), eventlog.SM3)
			for i := range l.Events {
				l.Events[i].Digests = append(l.Events[i].Digests, eventlog.Digest{Hash: eventlog.SM3, Value: make([]byte, 32)})
			}
			alter(l.Events[last(l, 11)], crypto.SHA256)
		})},
	{rule: "PCR 16 can be reset: no boot policy is judged by it", says: "PCR 16 does not exist or can be reset without a reboot",
		policy: func(p *bootpolicy.BootPolicy) { p.PCRs[16] = bootpolicy.Rule{Any: true} },
		forge:  func(_ *testing.T, s saidBefore) *attest.Evidence { return s.honest }},
	{rule: "PCR 11 moves after the boot: a phase more is another boot", says: "boot phase is new",
		forge: func(_ *testing.T, s saidBefore) *attest.Evidence { return s.later }},
	{rule: "PCR 11 moves after the boot: a phase can't be left out", says: "does not lead to the quoted value of PCR 11",
		forge: func(_ *testing.T, s saidBefore) *attest.Evidence {
			e := *s.later
			e.UserspaceLog = s.honest.UserspaceLog
			return &e
		}},
	{rule: "the operating system's separator ends nothing: the firmware's is still missing", policy: anything(7), says: "secureBoot: PCR 7 does not prove",
		forge: otherwise(func(t *testing.T, l *eventlog.Log) {
			os := []byte(eventlog.OSSeparator)
			l.Events[first(t, l, 7, eventlog.Separator)] = eventlog.Measure(l.Banks, 7, eventlog.EventTag, os, os)
		})},
	{rule: "the operating system's separator is stripped by its digest: another event under its name counts", says: "pcrs.7.sequences[0]",
		forge: otherwise(func(_ *testing.T, l *eventlog.Log) {
			l.Append([]eventlog.Event{eventlog.Measure(l.Banks, 7, eventlog.EventTag, []byte("rootkit"), []byte(eventlog.OSSeparator))})
		})},
}

// only returns an event with the digest of one bank.
func only(e eventlog.Event, bank crypto.Hash) eventlog.Event {
	e.Digests = slices.DeleteFunc(slices.Clone(e.Digests), func(d eventlog.Digest) bool { return d.Hash != bank })
	return e
}

// padded is a startup locality in an entry of 50 bytes, as coreboot logs it.
func padded(l *eventlog.Log, n byte) eventlog.Event {
	e := locality(l, n)
	e.UntrustedData = append(e.UntrustedData, make([]byte, 33)...)
	return e
}

// locality3 accepts a machine whose TPM was started from locality 3.
func locality3(p *bootpolicy.BootPolicy) {
	three := 3
	p.Firmware.StartupLocality = &three
}

// eventOf is an event on a PCR in a log's encoding, with one SHA-256 digest.
func eventOf(pcr byte, typ eventlog.EventType) []byte {
	l := &eventlog.Log{Banks: []crypto.Hash{crypto.SHA256}}
	bare := len(l.Encode())
	l.Events = []eventlog.Event{eventlog.Measure(l.Banks, 15, typ, []byte("x"), nil)}
	b := l.Encode()[bare:]
	b[0] = pcr
	return b
}

// theyAccept changes the bytes of a log only in the quoted bank, in a way that
// go-attestation accepts.
func theyAccept(change func(raw []byte) []byte) func(*testing.T, saidBefore) *attest.Evidence {
	return func(t *testing.T, s saidBefore) *attest.Evidence {
		t.Helper()
		e := edit(t, s.honest, func(l *eventlog.Log) { *l = *l.Only(crypto.SHA256) })
		e.FirmwareLog = change(e.FirmwareLog)
		theirs, err := goattest.ParseEventLog(e.FirmwareLog)
		if err != nil {
			t.Fatalf("go-attestation: %v", err)
		}
		var pcrs []goattest.PCR
		for _, i := range []int{0, 4, 7} { // user space's events are not in this log
			pcrs = append(pcrs, goattest.PCR{Index: i, Digest: e.Quote.PCRs[i], DigestAlg: crypto.SHA256})
		}
		if _, err := theirs.Verify(pcrs); err != nil {
			t.Fatalf("go-attestation: %v", err)
		}
		return e
	}
}

func TestRulesOfTheGate(t *testing.T) {
	b := phased()
	b.Phases = "enter-initrd:leave-initrd:sysinit"
	m := tpmtest.New(t, b)
	s := saidBefore{
		honest:    collect(t, m, gateDemand),
		earlier:   collect(t, m, demand{[]byte("an earlier nonce"), crypto.SHA256, gateDemand.pcrs}),
		otherPCRs: collect(t, m, demand{nonce, crypto.SHA256, []int{0, 4, 7}}),
		otherBank: collect(t, m, demand{nonce, crypto.SHA384, gateDemand.pcrs}),
	}
	b.Phases = simboot.AllPhases
	m.Reboot(b)
	s.later = collect(t, m, gateDemand)
	for _, r := range gateRules {
		t.Run(r.rule, func(t *testing.T) {
			result, err := gateDemand.result(s.honest)
			if err != nil {
				t.Fatal(err)
			}
			p, err := bootpolicy.Record(result.Log, crypto.SHA256, gateDemand.pcrs)
			if err != nil {
				t.Fatal(err)
			}
			if r.policy != nil {
				r.policy(p)
			}
			err = gateDemand.gate(r.forge(t, s), p)
			switch {
			case r.says == "" && err != nil:
				t.Error(err)
			case r.says != "" && (err == nil || !strings.Contains(err.Error(), r.says)):
				t.Errorf("%v, want %q", err, r.says)
			}
		})
	}
}

// TestNoEvidenceWithoutATPM: without a TPM there is no evidence.
func TestNoEvidenceWithoutATPM(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	if err := m.PowerOff(); err != nil {
		t.Fatal(err)
	}
	if e, err := attester(m).Collect(t.Context(), nil, nonce, crypto.SHA256, gateDemand.pcrs); err == nil || e != nil {
		t.Errorf("%v, %v", e, err)
	}
}
