package main

import (
	"bytes"
	"crypto"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// boot holds what a machine measured, or claims to have measured. Mutations replace parts
// and change nothing in place, because boots share their events with their source.
type boot struct {
	log     eventlog.Log
	records []string
	edits   []func(firmware, userspace []byte) ([]byte, []byte) // after encoding
}

func (s *source) boot() *boot {
	b := &boot{log: *s.log, records: slices.Clone(s.records)}
	b.log.Events, b.log.Banks = slices.Clone(s.log.Events), slices.Clone(s.log.Banks)
	return b
}

func (b *boot) encode() (firmware, userspace []byte) {
	firmware, userspace = b.log.Encode(), []byte(strings.Join(b.records, ""))
	for _, edit := range b.edits {
		firmware, userspace = edit(firmware, userspace)
	}
	return firmware, userspace
}

// dice are the random choices of a mutation.
type dice struct {
	*rand.Rand
	all []*source
}

func pick[T any](d *dice, list []T) T { return list[d.IntN(len(list))] }

// another returns an event of any boot.
func (d *dice) another() eventlog.Event { return pick(d, pick(d, d.all).log.Events) }

func (d *dice) text() []byte {
	return pick(d, [][]byte{nil, {0, 0, 0, 0}, {1, 0, 0, 0}, {0xff, 0xff, 0xff, 0xff}, []byte("StartupLocality\x00\x03"), []byte("StartupLocality\x00\x00"), []byte("StartupLocality\x00\x03\x00\x00"),
		[]byte("StartupLocality"), []byte("StartupLocality!\x03"), []byte("Spec ID Event03\x00"), []byte("grub_cmd: linux /vmlinuz init=/bin/sh"), bytes.Repeat([]byte{0xff}, d.IntN(80)), d.another().UntrustedData})
}

func (d *dice) typ() eventlog.EventType {
	return pick(d, []eventlog.EventType{eventlog.NoAction, eventlog.Separator, eventlog.IPL, eventlog.EventTag, eventlog.CRTMVersion, eventlog.Action,
		eventlog.EFIVariableAuthority, eventlog.EFIVariableDriverConfig, eventlog.EFIVariableBoot, eventlog.EFIBootServicesApp, eventlog.EventType(d.Uint32()), d.another().UntrustedType})
}

func (d *dice) digests(list []crypto.Hash) []eventlog.Digest {
	return eventlog.Measure(list, 0, 0, d.text(), nil).Digests
}

// mutation changes a boot in one way. It does nothing if there is nothing to change.
type mutation struct {
	name  string
	apply func(d *dice, b *boot)
}

// event makes a mutation of one event.
func event(name string, change func(d *dice, b *boot, e *eventlog.Event)) mutation {
	return mutation{name, func(d *dice, b *boot) {
		if len(b.log.Events) > 0 {
			change(d, b, &b.log.Events[d.IntN(len(b.log.Events))])
		}
	}}
}

// place makes a mutation of the order of events, from two indices.
func place(name string, change func(l *eventlog.Log, i, k int)) mutation {
	return mutation{name, func(d *dice, b *boot) {
		if n := len(b.log.Events); n > 0 {
			change(&b.log, d.IntN(n), d.IntN(n))
		}
	}}
}

// inserted makes a mutation that adds an event.
func inserted(name string, make func(d *dice, b *boot) eventlog.Event) mutation {
	return mutation{name, func(d *dice, b *boot) {
		b.log.Events = slices.Insert(b.log.Events, d.IntN(len(b.log.Events)+1), make(d, b))
	}}
}

// filtered makes a mutation that removes events of one PCR, or changes them.
func filtered(name string, change func(d *dice, e eventlog.Event) []eventlog.Event) mutation {
	return mutation{name, func(d *dice, b *boot) {
		pcr := d.IntN(16)
		var events []eventlog.Event
		for _, e := range b.log.Events {
			if e.PCR == pcr {
				events = append(events, change(d, e)...)
			} else {
				events = append(events, e)
			}
		}
		b.log.Events = events
	}}
}

func isSeparator(e eventlog.Event) bool { return e.UntrustedType == eventlog.Separator }

var separatorData = [][]byte{{0, 0, 0, 0}, {0xff, 0xff, 0xff, 0xff}, {1, 0, 0, 0}}

var mutations = slices.Concat(ofEvents, ofLogs, ofBanks, ofRecords, ofBytes)

var ofEvents = []mutation{
	place("event dropped", func(l *eventlog.Log, i, _ int) { l.Events = slices.Delete(l.Events, i, i+1) }),
	place("event doubled", func(l *eventlog.Log, i, _ int) { l.Events = slices.Insert(l.Events, i, l.Events[i]) }),
	place("event repeated elsewhere", func(l *eventlog.Log, i, k int) { l.Events = slices.Insert(l.Events, k, l.Events[i]) }),
	place("events swapped", func(l *eventlog.Log, i, k int) { l.Events[i], l.Events[k] = l.Events[k], l.Events[i] }),
	place("event moved", func(l *eventlog.Log, i, k int) {
		e := l.Events[i]
		l.Events = slices.Insert(slices.Delete(l.Events, i, i+1), min(k, len(l.Events)-1), e)
	}),
	event("type changed", func(d *dice, _ *boot, e *eventlog.Event) { e.UntrustedType = d.typ() }),
	event("hidden as EV_NO_ACTION", func(d *dice, b *boot, e *eventlog.Event) {
		*e = eventlog.Informational(b.log.Banks, e.PCR, e.UntrustedData)
	}),
	event("EV_NO_ACTION with its digest", func(_ *dice, _ *boot, e *eventlog.Event) { e.UntrustedType = eventlog.NoAction }),
	event("data changed", func(d *dice, _ *boot, e *eventlog.Event) { e.UntrustedData = d.text() }),
	event("bit of the data", func(d *dice, _ *boot, e *eventlog.Event) { e.UntrustedData = flipped(d, e.UntrustedData) }),
	event("same data, other digest", func(d *dice, b *boot, e *eventlog.Event) { e.Digests = d.digests(b.log.Banks) }),
	event("same digest, other event", func(d *dice, _ *boot, e *eventlog.Event) {
		other := d.another()
		e.UntrustedType, e.UntrustedData = other.UntrustedType, other.UntrustedData
	}),
	event("bit of a digest", func(d *dice, _ *boot, e *eventlog.Event) {
		if len(e.Digests) > 0 {
			e.Digests = slices.Clone(e.Digests)
			at := &e.Digests[d.IntN(len(e.Digests))]
			at.Value = flipped(d, at.Value)
		}
	}),
	event("other PCR", func(d *dice, _ *boot, e *eventlog.Event) { e.PCR = d.IntN(eventlog.NumPCRs) }),
	event("no such PCR", func(d *dice, _ *boot, e *eventlog.Event) { e.PCR = pick(d, []int{-1, 24, 255, 1 << 20}) }),
}

var ofLogs = []mutation{
	inserted("EV_NO_ACTION inserted", func(d *dice, b *boot) eventlog.Event {
		return eventlog.Informational(b.log.Banks, pick(d, []int{0, d.IntN(24), eventlog.NoPCR}), d.text())
	}),
	inserted("StartupLocality inserted", func(d *dice, b *boot) eventlog.Event {
		return eventlog.Informational(b.log.Banks, 0, append([]byte("StartupLocality\x00"), byte(d.IntN(6))))
	}),
	inserted("event on no such PCR inserted", func(d *dice, b *boot) eventlog.Event {
		e := eventlog.Measure(b.log.Banks, 0, d.typ(), d.text(), d.text())
		if e.UntrustedType == eventlog.NoAction {
			e = eventlog.Informational(b.log.Banks, 0, e.UntrustedData)
		}
		e.PCR = pick(d, []int{24, 30, 255, 1 << 20})
		return e
	}),
	{"padded StartupLocality first", func(d *dice, b *boot) { // go-attestation overlooks it
		e := eventlog.Informational(b.log.Banks, 0, append([]byte("StartupLocality\x00"), append([]byte{byte(d.IntN(5))}, make([]byte, 1+d.IntN(40))...)...))
		b.log.Events = slices.Insert(b.log.Events, 0, e)
	}},
	{"StartupLocality first", func(d *dice, b *boot) { // go-attestation takes the second for one
		name := pick(d, []string{"StartupLocality\x00", "StartupLocality!"})
		e := eventlog.Informational(b.log.Banks, 0, append([]byte(name), byte(d.IntN(5))))
		b.log.Events = slices.Insert(b.log.Events, 0, e)
	}},
	inserted("separator inserted", func(d *dice, b *boot) eventlog.Event {
		data := pick(d, separatorData)
		return eventlog.Measure(b.log.Banks, d.IntN(16), pick(d, []eventlog.EventType{eventlog.Separator, eventlog.Separator, d.typ()}), data, data)
	}),
	inserted("event of another boot inserted", func(d *dice, b *boot) eventlog.Event {
		e := d.another()
		return eventlog.Measure(b.log.Banks, max(e.PCR, 0), e.UntrustedType, e.UntrustedData, e.UntrustedData)
	}),
	filtered("separators doubled", func(_ *dice, e eventlog.Event) []eventlog.Event {
		if isSeparator(e) {
			return []eventlog.Event{e, e}
		}
		return []eventlog.Event{e}
	}),
	filtered("separators removed", func(_ *dice, e eventlog.Event) []eventlog.Event {
		if isSeparator(e) {
			return nil
		}
		return []eventlog.Event{e}
	}),
	filtered("separators relabelled", func(d *dice, e eventlog.Event) []eventlog.Event {
		if isSeparator(e) {
			e.UntrustedType = d.typ()
		}
		return []eventlog.Event{e}
	}),
	filtered("PCR emptied", func(*dice, eventlog.Event) []eventlog.Event { return nil }),
	filtered("PCR hidden as EV_NO_ACTION", func(_ *dice, e eventlog.Event) []eventlog.Event {
		e.UntrustedType = eventlog.NoAction
		return []eventlog.Event{e}
	}),
	filtered("PCR's types and data changed", func(d *dice, e eventlog.Event) []eventlog.Event {
		e.UntrustedType, e.UntrustedData = d.typ(), d.text()
		return []eventlog.Event{e}
	}),
	{"PCRs reordered", func(d *dice, b *boot) {
		order := d.Perm(eventlog.NumPCRs + 1)
		slices.SortStableFunc(b.log.Events, func(a, b eventlog.Event) int { return order[(a.PCR+25)%25] - order[(b.PCR+25)%25] })
	}},
	{"two PCRs exchanged", func(d *dice, b *boot) {
		i, k := d.IntN(16), d.IntN(16)
		for n := range b.log.Events {
			switch e := &b.log.Events[n]; e.PCR {
			case i:
				e.PCR = k
			case k:
				e.PCR = i
			}
		}
	}},
	{"cut after an event", func(d *dice, b *boot) { b.log.Events = b.log.Events[:d.IntN(len(b.log.Events)+1)] }},
	{"begins later", func(d *dice, b *boot) { b.log.Events = b.log.Events[d.IntN(len(b.log.Events)+1):] }},
	{"PCR of another boot", func(d *dice, b *boot) {
		pcr, other := d.IntN(16), pick(d, d.all)
		b.log.Events = slices.DeleteFunc(b.log.Events, func(e eventlog.Event) bool { return e.PCR == pcr })
		for _, e := range other.log.Events {
			if e.PCR == pcr {
				b.log.Events = append(b.log.Events, e)
			}
		}
	}},
	{"another boot", func(d *dice, b *boot) { *b = *pick(d, d.all).boot() }},
	{"grown", func(d *dice, b *boot) {
		if d.IntN(500) == 0 && len(b.log.Events) > 0 { // the largest logs take most of the time
			e := pick(d, b.log.Events)
			e.UntrustedData = e.UntrustedData[:min(64, len(e.UntrustedData))]
			b.log.Events = append(b.log.Events, slices.Repeat([]eventlog.Event{e}, d.IntN(eventlog.MaxEvents+2-len(b.log.Events)))...)
		}
	}},
}

var ofBanks = []mutation{
	{"bank dropped", func(d *dice, b *boot) {
		bank := pick(d, b.log.Banks)
		b.log.Banks = slices.DeleteFunc(b.log.Banks, func(h crypto.Hash) bool { return h == bank })
		for i := range b.log.Events {
			e := &b.log.Events[i]
			e.Digests = slices.DeleteFunc(slices.Clone(e.Digests), func(x eventlog.Digest) bool { return x.Hash == bank })
		}
		if len(b.log.Banks) == 0 {
			b.log.Banks = []crypto.Hash{bank}
		}
	}},
	{"bank added", func(d *dice, b *boot) {
		bank := pick(d, []crypto.Hash{crypto.SHA1, crypto.SHA256, crypto.SHA384, crypto.SHA512, crypto.SHA3_256, eventlog.SM3})
		b.log.Banks = slices.Insert(slices.Clone(b.log.Banks), d.IntN(len(b.log.Banks)+1), bank)
		for i := range b.log.Events {
			e := &b.log.Events[i]
			e.Digests = append(slices.Clone(e.Digests), eventlog.Informational([]crypto.Hash{bank}, 0, nil).Digests...)
		}
	}},
	{"banks reordered", func(d *dice, b *boot) {
		d.Shuffle(len(b.log.Banks), func(i, k int) { b.log.Banks[i], b.log.Banks[k] = b.log.Banks[k], b.log.Banks[i] })
	}},
	{"digests reordered", func(d *dice, b *boot) {
		for i := range b.log.Events {
			list := slices.Clone(b.log.Events[i].Digests)
			slices.Reverse(list)
			b.log.Events[i].Digests = list
		}
	}},
	event("digests of an event reordered", func(d *dice, _ *boot, e *eventlog.Event) {
		e.Digests = slices.Clone(e.Digests)
		slices.Reverse(e.Digests)
	}),
	event("digest missing", func(d *dice, _ *boot, e *eventlog.Event) {
		if len(e.Digests) > 0 {
			e.Digests = slices.Delete(slices.Clone(e.Digests), 0, 1)
		}
	}),
	{"other banks missing", func(d *dice, b *boot) { // in some events, or in all
		bank, all := pick(d, b.log.Banks), d.IntN(2) == 0
		for i := range b.log.Events {
			if all || d.IntN(4) == 0 {
				e := &b.log.Events[i]
				e.Digests = slices.DeleteFunc(slices.Clone(e.Digests), func(x eventlog.Digest) bool { return x.Hash != bank })
			}
		}
	}},
	event("digest twice", func(d *dice, b *boot, e *eventlog.Event) {
		e.Digests = append(slices.Clone(e.Digests), d.digests(b.log.Banks)...)
	}),
	event("digest under another bank's name", func(d *dice, b *boot, e *eventlog.Event) {
		if len(e.Digests) > 0 {
			e.Digests = slices.Clone(e.Digests)
			e.Digests[d.IntN(len(e.Digests))].Hash = pick(d, []crypto.Hash{crypto.SHA1, crypto.SHA256, crypto.SHA384, crypto.SHA3_256, eventlog.SM3, 99})
		}
	}),
}

// record makes a mutation of one record of systemd's log.
func record(name string, change func(d *dice, r string) string) mutation {
	return mutation{name, func(d *dice, b *boot) {
		if len(b.records) > 0 {
			i := d.IntN(len(b.records))
			b.records[i] = change(d, b.records[i])
		}
	}}
}

var (
	pcrField    = regexp.MustCompile(`"pcr":\d+`)
	stringField = regexp.MustCompile(`"string":"[^"]*"`)
	digestField = regexp.MustCompile(`"digest":"[0-9a-f]+`)
)

var ofRecords = []mutation{
	{"record dropped", func(d *dice, b *boot) {
		if n := len(b.records); n > 0 {
			i := d.IntN(n)
			b.records = slices.Delete(b.records, i, i+1)
		}
	}},
	{"record doubled", func(d *dice, b *boot) {
		if n := len(b.records); n > 0 {
			b.records = slices.Insert(b.records, d.IntN(n), b.records[d.IntN(n)])
		}
	}},
	{"records reordered", func(d *dice, b *boot) {
		d.Shuffle(len(b.records), func(i, k int) { b.records[i], b.records[k] = b.records[k], b.records[i] })
	}},
	{"record invented", func(d *dice, b *boot) {
		b.records = slices.Insert(b.records, d.IntN(len(b.records)+1), newRecord(d.IntN(26), pick(d, []string{eventlog.OSSeparator, "enter-initrd", "ready"})))
	}},
	{"record for an event", func(d *dice, b *boot) { // the digest of the text, where the event had that of its data
		if n := len(b.log.Events); n > 0 {
			e := b.log.Events[n-1]
			b.log.Events = b.log.Events[:n-1]
			b.records = slices.Insert(b.records, 0, newRecord(e.PCR, string(e.UntrustedData)))
		}
	}},
	{"event for a record", func(d *dice, b *boot) {
		if len(b.records) > 0 {
			events, err := eventlog.ParseUserspace([]byte(b.records[0]))
			if err == nil && len(events) == 1 {
				b.log.Events, b.records = append(b.log.Events, eventlog.Measure(b.log.Banks, events[0].PCR, d.typ(), events[0].UntrustedData, d.text())), b.records[1:]
			}
		}
	}},
	record("record's PCR", func(d *dice, r string) string {
		return pcrField.ReplaceAllString(r, pick(d, []string{`"pcr":7`, `"pcr":11`, `"pcr":14`, `"pcr":24`, `"pcr":-1`, `"PCR":7`, `"pcr":"7"`, `"pcr":11,"pcr":7`}))
	}),
	record("record into an NV index", func(d *dice, r string) string {
		return pcrField.ReplaceAllString(r, pick(d, []string{`"nv_index":30474705`, `"nv_index":1,"pcr":11`}))
	}),
	record("record's text", func(d *dice, r string) string {
		return stringField.ReplaceAllString(r, `"string":"`+pick(d, []string{"ready", "", eventlog.OSSeparator, `\u0000`})+`"`)
	}),
	record("record's digests", func(d *dice, r string) string {
		return digestField.ReplaceAllStringFunc(r, func(s string) string { return string(flippedHex(d, []byte(s))) })
	}),
	record("record's bank", func(d *dice, r string) string {
		return strings.Replace(r, `"sha256"`, pick(d, []string{`"sha384"`, `"sha257"`, `"SHA256"`}), 1)
	}),
	record("record separators in a row", func(d *dice, r string) string {
		return pick(d, []string{"\x1e", "\x1e\x1e \n", "\x1e\n"}) + r
	}),
	record("record cut", func(d *dice, r string) string { return r[:d.IntN(len(r)+1)] }),
}

// flippedHex changes the last digit.
func flippedHex(d *dice, b []byte) []byte {
	b[len(b)-1] = "0123456789abcdefg"[d.IntN(17)]
	return b
}

func flipped(d *dice, b []byte) []byte {
	if len(b) == 0 {
		return b
	}
	b = slices.Clone(b)
	b[d.IntN(len(b))] ^= 1 << d.IntN(8)
	return b
}

// ofFile makes a mutation of the bytes of one of both logs.
func ofFile(name string, change func(d *dice, b []byte) []byte) mutation {
	return mutation{name, func(d *dice, b *boot) {
		second := d.IntN(4) == 0
		b.edits = append(b.edits, func(firmware, userspace []byte) ([]byte, []byte) {
			if second && len(userspace) > 0 {
				return firmware, change(d, userspace)
			}
			return change(d, firmware), userspace
		})
	}}
}

func span(d *dice, b []byte) (from, to int) {
	from = d.IntN(len(b) + 1)
	return from, min(from+d.IntN(200), len(b))
}

var ofBytes = []mutation{
	ofFile("bit flipped", flipped),
	ofFile("bits flipped", func(d *dice, b []byte) []byte {
		for range 1 + d.IntN(8) {
			b = flipped(d, b)
		}
		return b
	}),
	ofFile("number made large", func(d *dice, b []byte) []byte {
		if len(b) < 4 {
			return b
		}
		b, at := slices.Clone(b), d.IntN(len(b)-3)
		copy(b[at:], pick(d, [][]byte{{0xff, 0xff, 0xff, 0xff}, {0xff, 0xff, 0xff, 0x7f}, {0, 0, 0, 0}, {0, 0, 1, 0}}))
		return b
	}),
	ofFile("truncated", func(d *dice, b []byte) []byte { return b[:d.IntN(len(b)+1)] }),
	ofFile("bytes removed", func(d *dice, b []byte) []byte {
		from, to := span(d, b)
		return slices.Delete(slices.Clone(b), from, to)
	}),
	ofFile("bytes repeated", func(d *dice, b []byte) []byte {
		from, to := span(d, b)
		return slices.Insert(slices.Clone(b), from, b[from:to]...)
	}),
	ofFile("bytes behind the end", func(d *dice, b []byte) []byte { return append(slices.Clone(b), d.text()...) }),
	ofFile("spliced", func(d *dice, b []byte) []byte {
		other := pick(d, d.all).log.Encode()
		return append(slices.Clone(b[:d.IntN(len(b)+1)]), other[d.IntN(len(other)):]...)
	}),
}
