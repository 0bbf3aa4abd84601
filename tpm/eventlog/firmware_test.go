package eventlog

import (
	"bytes"
	"crypto"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// firmwareFile reads a log of testdata/firmware.
func firmwareFile(t *testing.T, name string) []byte {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata/firmware", name))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// firmwarePCRs reads the values of one bank for such a log.
func firmwarePCRs(t *testing.T, name string, bank crypto.Hash) PCRs {
	t.Helper()
	var banks map[string]map[int]string
	if err := json.Unmarshal(firmwareFile(t, name+".pcrs.json"), &banks); err != nil {
		t.Fatal(err)
	}
	pcrs := PCRs{}
	for i, s := range banks[BankName(bank)] {
		value, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		pcrs[i] = value
	}
	return pcrs
}

// TestLogsOfOddFirmware: logs that break a rule which the replay does not need still
// lead to the right values, and go-attestation agrees.
func TestLogsOfOddFirmware(t *testing.T) {
	for name, c := range map[string]struct {
		bank   crypto.Hash
		values string // the file with the right values
	}{
		"one-event-sha256-only": {crypto.SHA256, "one-event-sha256-only"},
		"pcr-24":                {crypto.SHA256, "pcr-24"},
		"pcr-255-no-action":     {crypto.SHA256, "pcr-24"},
		"sha256-alone":          {crypto.SHA256, "pcr-24"},
		"sha384-alone":          {crypto.SHA384, "sha384-alone"},
	} {
		l, err := Parse(firmwareFile(t, name))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		want := firmwarePCRs(t, c.values, c.bank)
		got, err := l.Replay(c.bank)
		if err != nil || len(want) == 0 || !maps.EqualFunc(got, want, bytes.Equal) {
			t.Errorf("%s: %x, %v, want %x", name, got, err, want)
		}
		if err := l.Verify(c.bank, want); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := oracle(l.Encode(), c.bank, want); err != nil {
			t.Errorf("%s: go-attestation: %v", name, err)
		}
	}
}

// TestLogsOfNoUse: each kind of useless log has its own error, so that each has its own
// remedy.
func TestLogsOfNoUse(t *testing.T) {
	if _, err := Parse(nil); !errors.Is(err, ErrEmptyLog) {
		t.Errorf("an empty log: %v", err)
	}
	if _, err := Parse(firmwareFile(t, "sha1-format")); !errors.Is(err, ErrSHA1Log) {
		t.Errorf("a log of TPM 1.2: %v", err)
	}
	l, err := Parse(firmwareFile(t, "sha384-alone"))
	if err != nil {
		t.Fatal(err)
	}
	err = l.Verify(crypto.SHA256, PCRs{7: make([]byte, 32)})
	var bank *BankError
	if !errors.As(err, &bank) || bank.Bank != crypto.SHA256 || !slices.Equal(bank.Has, []crypto.Hash{crypto.SHA384}) {
		t.Errorf("a log without the bank: %v", err)
	}
	const want = "the event log has no sha256 digests; it has sha384"
	if err == nil || err.Error() != want {
		t.Errorf("%v, want %q", err, want)
	}
}

// TestEventsOfFewerBanks: a log replays in each complete bank and in no other. It does
// not lead to the values of a boot without the incomplete event.
func TestEventsOfFewerBanks(t *testing.T) {
	for _, name := range realLogs {
		whole := parseLog(t, name)
		for i, e := range whole.Events {
			if !e.extends() || i%5 != 0 {
				continue
			}
			l, err := Parse(whole.without(i, crypto.SHA1, crypto.SHA384).Encode())
			if err != nil {
				t.Fatalf("%s, event %d: %v", name, i, err)
			}
			quoted := readPCRs(t, name, crypto.SHA256)
			delete(quoted, 10)
			if err := l.Verify(crypto.SHA256, quoted); err != nil {
				t.Errorf("%s, event %d: %v", name, i, err)
			}
			if err := oracle(l.Encode(), crypto.SHA256, quoted); err != nil {
				t.Errorf("%s, event %d: go-attestation: %v", name, i, err)
			}
			var incomplete *IncompleteError
			if _, err := l.Replay(crypto.SHA384); !errors.As(err, &incomplete) || incomplete.Event != i || incomplete.PCR != e.PCR {
				t.Errorf("%s, event %d: an incomplete bank replays: %v", name, i, err)
			}
		}
	}
	none := &Log{Banks: sha256Only, Events: []Event{{PCR: 4, UntrustedType: IPL}}}
	l, err := Parse(none.Encode())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Replay(crypto.SHA256); err == nil {
		t.Error("an event without any digest replays")
	}
	if l.Events[0].Proves(nil) {
		t.Error("an event without any digest proves something")
	}
}

// without returns the log with some digests of one event left out.
func (l *Log) without(event int, banks ...crypto.Hash) *Log {
	c := &Log{Banks: l.Banks, spec: l.spec, Events: slices.Clone(l.Events)}
	e := &c.Events[event]
	e.Digests = slices.DeleteFunc(slices.Clone(e.Digests), func(d Digest) bool { return slices.Contains(banks, d.Hash) })
	return c
}

// TestEventsOnPCRsThatDoNotExist: such events extend nothing, whatever they claim: the
// log gives the same values without them. Events that were really extended must still
// be in the log.
func TestEventsOnPCRsThatDoNotExist(t *testing.T) {
	whole, quoted := parseLog(t, "uki-secureboot"), readPCRs(t, "uki-secureboot", crypto.SHA256)
	delete(quoted, 10)
	for _, pcr := range []uint32{24, 30, 31, 255, 1 << 16, 1 << 31, 0xfffffffe, 0xffffffff} {
		for _, typ := range []EventType{IPL, Separator, EFIVariableAuthority, NoAction} {
			e := Measure(whole.Banks, 4, typ, make([]byte, 4), []byte("StartupLocality\x00\x03"))
			if typ == NoAction {
				e = Informational(whole.Banks, 4, e.UntrustedData)
			}
			at := len((&Log{Banks: whole.Banks, spec: whole.spec, Events: whole.Events[:9]}).Encode())
			raw := (&Log{Banks: whole.Banks, spec: whole.spec, Events: slices.Insert(slices.Clone(whole.Events), 9, e)}).Encode()
			binary.LittleEndian.PutUint32(raw[at:], pcr)
			l, err := Parse(raw)
			if err != nil {
				t.Errorf("PCR %d, %v: %v", pcr, typ, err)
				continue
			}
			if !bytes.Equal(l.Encode(), raw) {
				t.Errorf("PCR %d, %v: Encode(Parse(x)) is not x", pcr, typ)
			}
			if err := l.Verify(crypto.SHA256, quoted); err != nil {
				t.Errorf("PCR %d, %v: %v", pcr, typ, err)
			}
			if err := oracle(raw, crypto.SHA256, quoted); err != nil {
				t.Errorf("PCR %d, %v: go-attestation: %v", pcr, typ, err)
			}
			if on, known := l.SecureBoot(); !on || !known || l.BootType() != BootUKI {
				t.Errorf("PCR %d, %v: Secure Boot %v, %v, booted by %v", pcr, typ, on, known, l.BootType())
			}
		}
	}
	for i, e := range whole.Events {
		if e.PCR != 4 {
			continue
		}
		moved := &Log{Banks: whole.Banks, Events: slices.Clone(whole.Events)}
		moved.Events[i].PCR = 24
		var mismatch *MismatchError
		if err := moved.Verify(crypto.SHA256, quoted); !errors.As(err, &mismatch) || !slices.Equal(mismatch.PCRs, []int{4}) {
			t.Errorf("event %d of PCR 4, claimed to be PCR 24's: %v", i, err)
		}
	}
}

// TestPaddedStartupLocality: coreboot logs entries of a fixed size. Other parsers read
// the locality once the entry is cut down to its structure.
func TestPaddedStartupLocality(t *testing.T) {
	for _, name := range realLogs {
		whole := parseLog(t, name)
		plain, err := whole.Replay(crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		for n := range byte(5) {
			for what, padding := range map[string][]byte{"none": nil, "a byte": {0}, "coreboot's": make([]byte, 33), "odd": []byte("StartupLocality\x00\x00")} {
				first := Informational(whole.Banks, 0, slices.Concat([]byte(startupLocality), []byte{n}, padding))
				l, err := Parse((&Log{Banks: whole.Banks, Events: slices.Insert(slices.Clone(whole.Events), 0, first)}).Encode())
				if err != nil {
					t.Fatal(err)
				}
				if got, err := l.StartupLocality(); got != n || err != nil {
					t.Errorf("padding %s: locality %d, %v, want %d", what, got, err, n)
				}
				got, err := l.Replay(crypto.SHA256)
				if err != nil || bytes.Equal(got[0], plain[0]) != (n == 0) || !bytes.Equal(got[4], plain[4]) {
					t.Errorf("padding %s, locality %d: %x, %v", what, n, got[0], err)
				}
				if l.HasPaddedLocality() != (len(padding) > 0) {
					t.Errorf("padding %s: %v", what, l.HasPaddedLocality())
				}
				trimmed := l.WithoutPadding()
				if len(trimmed.Events[0].UntrustedData) != 17 || len(l.Events[0].UntrustedData) != 17+len(padding) {
					t.Errorf("padding %s: %d bytes trimmed to %d", what, len(l.Events[0].UntrustedData), len(trimmed.Events[0].UntrustedData))
				}
				if err := oracle(trimmed.Encode(), crypto.SHA256, got); err != nil {
					t.Errorf("padding %s, locality %d: go-attestation: %v", what, n, err)
				}
			}
		}
	}
}

// TestTheTPMIsBehind distinguishes a TPM that has measured less than the log lists from
// a TPM with other measurements.
func TestTheTPMIsBehind(t *testing.T) {
	event := func(pcr int, s string) Event { return Measure(sha256Only, pcr, IPL, []byte(s), []byte(s)) }
	l := &Log{Banks: sha256Only, Events: []Event{event(4, "kernel"), event(11, "kernel"), event(11, "enter-initrd"), event(11, "ready"), event(15, "id")}}
	after := func(events ...Event) []byte {
		pcrs, err := (&Log{Banks: sha256Only, Events: events}).Replay(crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		return pcrs[events[0].PCR]
	}
	kernel, reset, other := after(event(4, "kernel")), make([]byte, 32), after(event(4, "other"))
	for name, c := range map[string]struct {
		quoted PCRs
		behind bool
	}{
		"one PCR":                   {PCRs{4: kernel, 11: after(event(11, "kernel"), event(11, "enter-initrd"))}, true},
		"two PCRs":                  {PCRs{4: kernel, 11: after(event(11, "kernel")), 15: reset}, true},
		"one behind, one otherwise": {PCRs{4: other, 11: after(event(11, "kernel"))}, false},
		"otherwise":                 {PCRs{4: other}, false},
		"without the first event":   {PCRs{11: after(event(11, "enter-initrd"), event(11, "ready"))}, false},
		"more than the log lists":   {PCRs{11: after(event(11, "kernel"), event(11, "enter-initrd"), event(11, "ready"), event(11, "shutdown"))}, false},
		"no event at all":           {PCRs{7: other}, false},
	} {
		var mismatch *MismatchError
		if err := l.Verify(crypto.SHA256, c.quoted); !errors.As(err, &mismatch) || mismatch.TPMIsBehind() != c.behind {
			t.Errorf("%s: %v, behind %v", name, err, c.behind)
		}
	}
}
