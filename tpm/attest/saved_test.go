package attest_test

import (
	"bytes"
	"crypto"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

func marshal(t testing.TB, e *attest.Evidence) []byte {
	t.Helper()
	b, err := e.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestSavedEvidenceVerifies: saved evidence verifies after reading as it did before,
// with the same ordered digests and the same nonce.
func TestSavedEvidenceVerifies(t *testing.T) {
	for _, boot := range []simboot.Boot{simboot.Baseline(simboot.UKI), simboot.Baseline(simboot.GRUB), phased()} {
		m := tpmtest.New(t, boot)
		for _, bank := range []crypto.Hash{crypto.SHA256, crypto.SHA384} {
			d := demand{nonce, bank, []int{0, 4, 7, 11}}
			e := collect(t, m, d)
			before, err := d.result(e)
			if err != nil {
				t.Fatal(err)
			}
			saved, err := attest.ParseEvidence(marshal(t, e), bank)
			if err != nil {
				t.Fatal(err)
			}
			after, err := d.result(saved)
			if err != nil || !reflect.DeepEqual(saved.Quote, e.Quote) {
				t.Fatalf("%v", err)
			}
			if len(e.UserspaceLog) == 0 && !bytes.Equal(saved.FirmwareLog, e.FirmwareLog) {
				t.Error("the firmware's log was changed")
			}
			if got, want := after.Log.Summarize(bank, d.pcrs), before.Log.Summarize(bank, d.pcrs); !reflect.DeepEqual(got, want) {
				t.Errorf("%v\nwant %v", got, want)
			}
			if n, err := saved.Nonce(); err != nil || !bytes.Equal(n, nonce) {
				t.Errorf("nonce %x, %v", n, err)
			}
			if !bytes.Equal(marshal(t, saved), marshal(t, e)) {
				t.Error("saved again it is another file")
			}
		}
	}
}

func field(number protowire.Number, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), value)
}

// without returns a message without one of its fields, and that field's value.
func without(t *testing.T, b []byte, number protowire.Number) (rest, value []byte) {
	t.Helper()
	for len(b) > 0 {
		n, typ, head := protowire.ConsumeTag(b)
		size := protowire.ConsumeFieldValue(n, typ, b[head:])
		if size < 0 {
			t.Fatal(protowire.ParseError(size))
		}
		if n == number {
			value, _ = protowire.ConsumeBytes(b[head:])
		} else {
			rest = append(rest, b[:head+size]...)
		}
		b = b[head+size:]
	}
	return rest, value
}

// TestSavedEvidenceIsReadStrictly: evidence that could be read in two ways is refused.
func TestSavedEvidenceIsReadStrictly(t *testing.T) {
	e := collect(t, tpmtest.New(t, simboot.Baseline(simboot.UKI)), ordinary)
	good := marshal(t, e)
	noQuote, quote := without(t, good, 2)
	noValues, values := without(t, quote, 3)
	value := append(protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 4), field(2, make([]byte, 32))...)
	beyond := append(protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 24), field(2, make([]byte, 32))...)
	empty := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 3)
	withQuote := func(more []byte) []byte { return slices.Concat(noQuote, field(2, slices.Concat(noValues, more))) }
	withValues := func(more []byte) []byte { return withQuote(field(3, slices.Concat(values, field(2, more)))) }
	number := func(field protowire.Number, n uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, field, protowire.VarintType), n)
	}
	long := append([]byte{0x9a, 0}, protowire.AppendBytes(nil, nil)...) // the tag of field 3, longer than it need be
	for name, c := range map[string]struct {
		b      []byte
		reason string
	}{
		"empty":                       {nil, "0 quotes over sha256"},
		"no quote":                    {noQuote, "0 quotes over sha256"},
		"two quotes":                  {slices.Concat(good, field(2, quote)), "2 quotes over sha256"},
		"two keys":                    {slices.Concat(good, field(1, []byte("key"))), "appears twice"},
		"two logs":                    {slices.Concat(good, field(3, nil)), "appears twice"},
		"two statements":              {slices.Concat(noQuote, field(2, slices.Concat(quote, field(1, nil)))), "appears twice"},
		"two signatures":              {slices.Concat(noQuote, field(2, slices.Concat(quote, field(2, nil)))), "appears twice"},
		"two logs, one of an odd tag": {slices.Concat(good, long), "event_log appears twice"},
		"two statements, in a quote of an odd tag": {slices.Concat(noQuote, []byte{0x92, 0}, protowire.AppendBytes(nil, slices.Concat(quote, field(1, nil)))), "tpm.Quote.quote appears twice"},
		"values in two parts":                      {withQuote(slices.Concat(field(3, values), field(3, nil))), "tpm.Quote.pcrs appears twice"},
		"two banks of values":                      {withQuote(field(3, slices.Concat(values, number(1, 0xc)))), "tpm.PCRs.hash appears twice"},
		"a PCR twice":                              {withValues(value), "tpm.PCRs.pcrs[4] appears twice"},
		"a PCR twice, of 33 bits":                  {withValues(slices.Concat(number(1, 1<<32+4), field(2, make([]byte, 32)))), "tpm.PCRs.pcrs[4] appears twice"},
		"a key twice":                              {withValues(slices.Concat(number(1, 3), value)), "key appears twice"},
		"a digest twice":                           {withValues(slices.Concat(number(1, 3), field(2, nil), field(2, make([]byte, 32)))), "value appears twice"},
		"PCR 24":                                   {withValues(beyond), "PCR 24 does not exist"},
		"a PCR of no value":                        {withValues(empty), "PCR 3"},
		"two TEEs":                                 {slices.Concat(good, field(8, nil), field(9, nil)), "attest.Attestation.tee_attestation appears twice"},
		"a TEE's report twice":                     {slices.Concat(good, field(8, slices.Concat(field(1, nil), field(1, nil)))), "sevsnp.Attestation.report appears twice"},
		"an unknown field":                         {slices.Concat(good, number(99, 7)), "attest.Attestation has an unknown field, number 99"},
		"an unknown field, inside":                 {withQuote(slices.Concat(field(3, values), field(9, nil))), "tpm.Quote has an unknown field, number 9"},
		"a log as a number":                        {slices.Concat(good, number(3, 7)), "attest.Attestation has an unknown field, number 3 of wire type 0"},
		"a group":                                  {slices.Concat(good, protowire.AppendTag(protowire.AppendTag(nil, 3, protowire.StartGroupType), 3, protowire.EndGroupType)), "unknown field, number 3"},
		"truncated":                                {good[:len(good)-1], "saved evidence: "},
		"garbage":                                  {bytes.Repeat([]byte{0xff}, 40), "saved evidence: "},
		"too large":                                {make([]byte, attest.MaxEvidence+1), "more than"},
	} {
		if _, err := attest.ParseEvidence(c.b, crypto.SHA256); err == nil || !strings.Contains(err.Error(), c.reason) {
			t.Errorf("%s: %v, want %q", name, err, c.reason)
		}
	}
	if _, err := attest.ParseEvidence(good, crypto.SHA384); err == nil || !strings.Contains(err.Error(), "0 quotes over sha384") {
		t.Errorf("another bank: %v", err)
	}
	// Fields that Evidence has no place for, and quotes over other banks, are skipped.
	more := slices.Concat(field(6, []byte("a certificate")), field(7, nil), field(7, nil), field(4, field(1, []byte("a zone"))), field(2, noValues), good)
	if read, err := attest.ParseEvidence(more, crypto.SHA256); err != nil || ordinary.verify(read) != nil {
		t.Errorf("with others' fields: %v", err)
	}
}

// TestGoldenEvidence: evidence that earlier versions saved is read as before, verifies,
// and is saved again as the same bytes.
func TestGoldenEvidence(t *testing.T) {
	for name, d := range map[string]demand{
		"grub-sha256.pb":       {nonce, crypto.SHA256, []int{0, 4, 7, 8, 9, 14}},
		"uki-phases-sha384.pb": {nonce, crypto.SHA384, []int{0, 4, 7, 11}},
	} {
		b, err := os.ReadFile(filepath.Join("testdata/saved", name))
		if err != nil {
			t.Fatal(err)
		}
		e, err := attest.ParseEvidence(b, d.bank)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := d.verify(e); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(marshal(t, e), b) {
			t.Errorf("%s: saved again it is another file", name)
		}
	}
}

// TestSavedEvidenceIsForged: an altered file does not verify.
func TestSavedEvidenceIsForged(t *testing.T) {
	e := collect(t, tpmtest.New(t, phased()), ordinary)
	for name, change := range map[string]func(*attest.Evidence){
		"a value": func(e *attest.Evidence) {
			e.Quote.PCRs = maps.Clone(e.Quote.PCRs)
			e.Quote.PCRs[7] = make([]byte, 32)
		},
		"the signature": func(e *attest.Evidence) {
			e.Quote.Signature = append(e.Quote.Signature[:len(e.Quote.Signature):len(e.Quote.Signature)], 0)[1:]
		},
		"no userspace log": func(e *attest.Evidence) { e.UserspaceLog = nil },
		"no firmware's log": func(e *attest.Evidence) {
			e.FirmwareLog, e.UserspaceLog = (&eventlog.Log{Banks: []crypto.Hash{crypto.SHA256}}).Encode(), nil
		},
	} {
		forged := *e
		change(&forged)
		read, err := attest.ParseEvidence(marshal(t, &forged), crypto.SHA256)
		if err == nil {
			err = ordinary.verify(read)
		}
		if err == nil {
			t.Errorf("%s: it verifies", name)
		}
	}
	broken := *e
	broken.UserspaceLog = []byte("no record")
	if _, err := broken.Marshal(); err == nil {
		t.Error("a log that can't be read is saved")
	}
}

// FuzzParseEvidence: parsed evidence is written again as the same bytes.
func FuzzParseEvidence(f *testing.F) {
	m := tpmtest.New(f, phased())
	a := attest.Attester{Device: m.TPM(), Logs: attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}}
	e, err := a.Collect(f.Context(), nil, nonce, crypto.SHA256, ordinary.pcrs)
	if err != nil {
		f.Fatal(err)
	}
	e.FirmwareLog = shorten(f, e.FirmwareLog)
	f.Add(marshal(f, e))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := attest.ParseEvidence(b, crypto.SHA256)
		if err != nil {
			return
		}
		again, err := attest.ParseEvidence(marshal(t, e), crypto.SHA256)
		if err != nil || !slices.Equal(e.Quote.Attest, again.Quote.Attest) || !slices.Equal(e.Quote.AKPublic, again.Quote.AKPublic) ||
			!slices.Equal(e.FirmwareLog, again.FirmwareLog) || !maps.EqualFunc(e.Quote.PCRs, again.Quote.PCRs, bytes.Equal) {
			t.Errorf("%v", err)
		}
		_, _ = e.Nonce()
	})
}
