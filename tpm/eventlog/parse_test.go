package eventlog

import (
	"bytes"
	"crypto"
	"encoding/binary"
	"math"
	"runtime"
	"strings"
	"testing"
)

// small is a log of two banks and one event, with known offsets.
func small() []byte {
	banks := []crypto.Hash{crypto.SHA1, crypto.SHA256}
	return (&Log{Banks: banks, Events: []Event{Measure(banks, 7, Separator, make([]byte, 4), make([]byte, 4))}}).Encode()
}

// Offsets in small.
const (
	atHeaderType   = 4
	atHeaderDigest = 8
	atHeaderSize   = 28
	atSignature    = 32
	atMajor        = atSignature + 21
	atBanks        = atSignature + 24
	atBank0        = atBanks + 4
	atVendorSize   = atBank0 + 8
	atEvent        = atVendorSize + 1
	atCount        = atEvent + 8
	atDigest0      = atCount + 4
	atDigest1      = atDigest0 + 2 + 20
	atDataSize     = atDigest1 + 2 + 32
)

func TestParseRefuses(t *testing.T) {
	u16, u32 := binary.LittleEndian.PutUint16, binary.LittleEndian.PutUint32
	for name, c := range map[string]struct {
		edit func(b []byte) []byte
		want string
	}{
		"empty":               {func(b []byte) []byte { return nil }, "the log is empty"},
		"too big":             {func(b []byte) []byte { return make([]byte, MaxSize+1) }, "more than 16777216"},
		"zeros":               {func(b []byte) []byte { return make([]byte, 4096) }, "SHA-1 format"},
		"header type":         {func(b []byte) []byte { b[atHeaderType] = 1; return b }, "EV_NO_ACTION on PCR 0"},
		"header PCR":          {func(b []byte) []byte { b[0] = 1; return b }, "EV_NO_ACTION on PCR 0"},
		"header digest":       {func(b []byte) []byte { b[atHeaderDigest] = 1; return b }, "EV_NO_ACTION on PCR 0"},
		"header size huge":    {func(b []byte) []byte { u32(b[atHeaderSize:], math.MaxUint32); return b }, "header: truncated"},
		"header size short":   {func(b []byte) []byte { u32(b[atHeaderSize:], 20); return b }, "header: truncated"},
		"header left over":    {func(b []byte) []byte { u32(b[atHeaderSize:], 40); return b }, "left over"},
		"signature":           {func(b []byte) []byte { b[atSignature+14] = '2'; return b }, "SHA-1 format"},
		"version":             {func(b []byte) []byte { b[atMajor] = 3; return b }, "specification version 3.0"},
		"minor version":       {func(b []byte) []byte { b[atMajor-1] = 1; return b }, "specification version 2.1"},
		"no banks":            {func(b []byte) []byte { u32(b[atBanks:], 0); return b }, "0 banks"},
		"many banks":          {func(b []byte) []byte { u32(b[atBanks:], math.MaxUint32); return b }, "4294967295 banks"},
		"one bank too many":   {func(b []byte) []byte { u32(b[atBanks:], 3); return b }, "header: truncated"},
		"unknown bank":        {func(b []byte) []byte { u16(b[atBank0:], 5); return b }, "unknown bank"},
		"bank twice":          {func(b []byte) []byte { copy(b[atBank0:], b[atBank0+4:atBank0+8]); return b }, "sha256 named twice"},
		"bank size":           {func(b []byte) []byte { u16(b[atBank0+2:], 32); return b }, "sha1 digests of 32 bytes"},
		"vendor info":         {func(b []byte) []byte { b[atVendorSize] = 1; return b }, "header: truncated"},
		"PCR 24, no action":   {func(b []byte) []byte { b[atEvent], b[atEvent+4] = 24, byte(NoAction); return b }, "digest that is not zeros"},
		"no digests":          {func(b []byte) []byte { u32(b[atCount:], 0); return b }, "event 0 at byte"},
		"one digest too few":  {func(b []byte) []byte { u32(b[atCount:], 1); return b }, "event 0 at byte"},
		"one digest too many": {func(b []byte) []byte { u32(b[atCount:], 3); return b }, "3 digests for 2 banks"},
		"too many digests":    {func(b []byte) []byte { u32(b[atCount:], math.MaxUint32); return b }, "4294967295 digests"},
		"digest twice":        {func(b []byte) []byte { u16(b[atDigest1:], 4); return b }, "two sha1 digests"},
		"digest unknown":      {func(b []byte) []byte { u16(b[atDigest0:], 0xc); return b }, "header does not name"},
		"digest error ID":     {func(b []byte) []byte { u16(b[atDigest0:], 0); return b }, "header does not name"},
		"data size":           {func(b []byte) []byte { u32(b[atDataSize:], 5); return b }, "event 0 at byte"},
		"data size huge":      {func(b []byte) []byte { u32(b[atDataSize:], math.MaxUint32); return b }, "truncated"},
		"trailing byte":       {func(b []byte) []byte { return append(b, 0) }, "event 1 at byte"},
		"extending no action": {func(b []byte) []byte { u32(b[atEvent+4:], uint32(NoAction)); return b }, "digest that is not zeros"},
		"too many events": {func(b []byte) []byte {
			return append(b, bytes.Repeat(b[atEvent:], MaxEvents)...)
		}, "more than 65536 events"},
	} {
		l, err := Parse(c.edit(small()))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, %v, want %q", name, l, err, c.want)
		}
	}
	if _, err := Parse(small()); err != nil {
		t.Errorf("the untouched log: %v", err)
	}
}

func TestParseRefusesEveryTruncation(t *testing.T) {
	raw := readLog(t, "uki-secureboot")
	l := parseLog(t, "uki-secureboot")
	whole := map[int]bool{} // lengths at which some event ends
	for i := range l.Events {
		whole[len((&Log{Banks: l.Banks, Events: l.Events[:i], spec: l.spec}).Encode())] = true
	}
	for n := range raw {
		if _, err := Parse(raw[:n]); (err == nil) != whole[n] {
			t.Fatalf("the first %d bytes: %v", n, err)
		}
	}
}

func TestParseIsBoundedInMemory(t *testing.T) {
	for name, raw := range map[string][]byte{
		"counts": func() []byte {
			b := small()
			binary.LittleEndian.PutUint32(b[atCount:], math.MaxUint32)
			return b
		}(),
		"sizes": func() []byte {
			b := small()
			binary.LittleEndian.PutUint32(b[atDataSize:], math.MaxUint32)
			return b
		}(),
		"events": append(small(), bytes.Repeat(small()[atEvent:], 1000)...),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _ = Parse(raw)
		runtime.ReadMemStats(&after)
		if got, limit := after.TotalAlloc-before.TotalAlloc, uint64(16*len(raw)+1<<16); got > limit {
			t.Errorf("%s: %d bytes allocated for a log of %d", name, got, len(raw))
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(small())
	f.Add(readLog(f, "direct-kernel"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		l, err := Parse(raw)
		if err != nil {
			return
		}
		if !bytes.Equal(l.Encode(), raw) {
			t.Error("Encode(Parse(x)) is not x")
		}
		if len(l.Events) > MaxEvents {
			t.Errorf("%d events", len(l.Events))
		}
		l.SecureBoot()
		l.BootType().PCRs(l)
		for _, bank := range l.Banks {
			summary := l.Summarize(bank, allPCRs)
			for _, s := range summary {
				checkWhat(t, s)
			}
			if d := Compare(summary, summary, nil, nil); len(d) > 0 {
				t.Errorf("differs from itself: %v", d)
			}
			for _, d := range Compare(nil, summary, nil, nil) {
				_ = d.String()
			}
			pcrs, err := l.Replay(bank)
			if err != nil {
				continue
			}
			if len(pcrs) > 0 {
				if err := l.Verify(bank, pcrs); err != nil {
					t.Errorf("its own replay does not verify: %v", err)
				}
			}
			// go-attestation implements these three, and accepts one bank at a time.
			if bank == crypto.SHA1 || bank == crypto.SHA256 || bank == crypto.SHA384 {
				if err := oracle(l.Only(bank).Encode(), bank, pcrs); err != nil {
					t.Errorf("go-attestation replays to other values: %v", err)
				}
			}
		}
	})
}

// FuzzReplay makes a log from the input, so that most inputs get past the parser, and
// compares Replay with go-attestation's.
func FuzzReplay(f *testing.F) {
	f.Add([]byte{0, 3, 3, 0, 8, 0, 0, 4, 0, 7, 4, 0})
	f.Add([]byte{4, 5, 9, 4, 4, 0, 11, 13, 200, 5, 7, 1})
	f.Fuzz(func(t *testing.T, raw []byte) {
		banks := []crypto.Hash{crypto.SHA1, crypto.SHA256, crypto.SHA384}
		l := &Log{Banks: banks}
		for ; len(raw) >= 3 && len(l.Events) < 200; raw = raw[3:] {
			pcr, typ, data := int(raw[0])%NumPCRs, EventType(raw[1]%16), raw[2:3]
			switch {
			case typ == NoAction && data[0] < 16:
				l.Events = append(l.Events, Informational(banks, pcr, append([]byte(startupLocality), data...)))
			case typ == NoAction:
				l.Events = append(l.Events, Informational(banks, pcr, data))
			default:
				l.Events = append(l.Events, Measure(banks, pcr, typ, data, data))
			}
		}
		for _, bank := range banks {
			pcrs, err := l.Replay(bank)
			if err != nil {
				continue
			}
			if err := oracle(l.Encode(), bank, pcrs); err != nil {
				t.Errorf("go-attestation replays to other values: %v", err)
			}
			for pcr, value := range pcrs {
				wrong := PCRs{pcr: bytes.Clone(value)}
				wrong[pcr][0] ^= 1
				if l.Verify(bank, wrong) == nil {
					t.Errorf("a wrong PCR %d passes", pcr)
				}
				if l.has(pcr, func(Event) bool { return true }) && oracle(l.Encode(), bank, wrong) == nil {
					t.Errorf("go-attestation lets a wrong PCR %d pass", pcr)
				}
			}
		}
	})
}
