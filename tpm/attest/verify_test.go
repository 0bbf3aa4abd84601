package attest_test

import (
	"bytes"
	"crypto"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// refused demands that evidence does not verify, for this reason.
func refused(t *testing.T, what string, err error, reason string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), reason) {
		t.Errorf("%s: %v, want %q", what, err, reason)
	}
}

func TestVerify(t *testing.T) {
	for _, loader := range []simboot.Loader{simboot.UKI, simboot.GRUB, simboot.EFIStub} {
		m := tpmtest.New(t, simboot.Baseline(loader))
		for _, d := range []demand{
			{nonce, crypto.SHA256, []int{4, 7}}, {nonce, crypto.SHA384, []int{4, 7}}, {nonce, crypto.SHA256, []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 14}},
			{nonce, crypto.SHA256, []int{7, 4}}, {nonce, crypto.SHA256, []int{10, 15}}, {nonce[:1], crypto.SHA256, []int{7}},
		} {
			e := collect(t, m, d)
			r, err := attest.Verify(e, d.nonce, d.bank, d.pcrs)
			if err != nil {
				t.Errorf("%s, %v %v: %v", loader, d.bank, d.pcrs, err)
				continue
			}
			if len(r.PCRs) != len(d.pcrs) || r.Bank != d.bank || r.Time.IsZero() || len(r.Log.Events) == 0 {
				t.Errorf("%s: %+v", loader, r)
			}
		}
	}
}

// TestTheForgersBest: Verify does not prove which TPM made the quote, as its comment
// says. The tests below would show nothing if the forger erred in anything else.
func TestTheForgersBest(t *testing.T) {
	e := collect(t, tpmtest.New(t, phased()), ordinary)
	if err := ordinary.verify(forge(t, e, func(*forger) {})); err != nil {
		t.Error(err)
	}
}

// TestForgedKey: the attestation key is a restricted signing key.
func TestForgedKey(t *testing.T) {
	e := collect(t, tpmtest.New(t, simboot.Baseline(simboot.UKI)), ordinary)
	for name, change := range map[string]func(*tpm2.TPMAObject){
		"unrestricted":         func(a *tpm2.TPMAObject) { a.Restricted = false },
		"no signing key":       func(a *tpm2.TPMAObject) { a.SignEncrypt = false },
		"a decryption key too": func(a *tpm2.TPMAObject) { a.Decrypt = true },
		"not of its TPM":       func(a *tpm2.TPMAObject) { a.FixedTPM = false },
		"movable":              func(a *tpm2.TPMAObject) { a.FixedParent = false },
		"imported":             func(a *tpm2.TPMAObject) { a.SensitiveDataOrigin = false },
	} {
		forged := forge(t, e, func(f *forger) { change(&f.public.ObjectAttributes) })
		refused(t, name, ordinary.verify(forged), "attestation key: ")
	}
	for name, public := range map[string][]byte{"none": nil, "truncated": e.Quote.AKPublic[:20], "text": []byte("-----BEGIN PUBLIC KEY-----"),
		"more than a key": append(slices.Clone(e.Quote.AKPublic), 0)} {
		forged := *e
		forged.Quote.AKPublic = public
		refused(t, name, ordinary.verify(&forged), "attestation key: ")
	}
}

// TestForgedQuote: the quote is a TPM's, made with that key, over the nonce and
// exactly the demanded PCRs of the bank.
func TestForgedQuote(t *testing.T) {
	e := collect(t, tpmtest.New(t, simboot.Baseline(simboot.UKI)), ordinary)
	const notFresh, notExactly, noStatement = "it is not fresh", "not over exactly the demanded PCRs", "no statement of a TPM"
	two := authpolicy.Selection(crypto.SHA256, []int{4, 7, 11})
	two.PCRSelections = append(two.PCRSelections, authpolicy.Selection(crypto.SHA384, []int{4}).PCRSelections...)
	for name, c := range map[string]struct {
		change func(*forger)
		reason string
	}{
		"magic": {func(f *forger) { f.attest.Magic = 0x12345678 }, noStatement},
		"type": {func(f *forger) {
			f.attest.Type = tpm2.TPMSTAttestCertify
			f.attest.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{})
		}, noStatement},
		"stale nonce":           {func(f *forger) { f.attest.ExtraData.Buffer = []byte("the nonce of an earlier attempt.") }, notFresh},
		"no nonce":              {func(f *forger) { f.attest.ExtraData.Buffer = nil }, notFresh},
		"nonce, prefix":         {func(f *forger) { f.attest.ExtraData.Buffer = nonce[:16] }, notFresh},
		"fewer PCRs":            {func(f *forger) { f.over(crypto.SHA256, 4, 7) }, notExactly},
		"fewer PCRs and values": {func(f *forger) { delete(f.quote.PCRs, 11); f.over(crypto.SHA256, 4, 7) }, notExactly},
		"more PCRs":             {func(f *forger) { f.quote.PCRs[0] = make([]byte, 32); f.over(crypto.SHA256, 0, 4, 7, 11) }, notExactly},
		"other PCRs":            {func(f *forger) { f.over(crypto.SHA256, 4, 7, 12) }, notExactly},
		"no PCRs":               {func(f *forger) { f.over(crypto.SHA256) }, notExactly},
		"no selection":          {func(f *forger) { f.info.PCRSelect.PCRSelections = nil }, notExactly},
		"another bank":          {func(f *forger) { f.over(crypto.SHA384, 4, 7, 11) }, notExactly},
		"SHA-1":                 {func(f *forger) { f.info.PCRSelect.PCRSelections[0].Hash = tpm2.TPMAlgSHA1 }, notExactly},
		"two banks":             {func(f *forger) { f.info.PCRSelect = two }, notExactly},
		"of another bank":       {func(f *forger) { f.quote.Bank = crypto.SHA384 }, "another PCR bank than demanded"},
		"a value less":          {func(f *forger) { delete(f.quote.PCRs, 7) }, notExactly},
		"a value more":          {func(f *forger) { f.quote.PCRs[0] = make([]byte, 32) }, notExactly},
		"a value for another":   {func(f *forger) { f.quote.PCRs[12] = f.quote.PCRs[7]; delete(f.quote.PCRs, 7) }, "no value of PCR 7"},
		"a short value":         {func(f *forger) { f.quote.PCRs[7] = f.quote.PCRs[7][:31] }, "no value of PCR 7"},
		"an altered value":      {func(f *forger) { f.quote.PCRs[7][0] ^= 1 }, "quote digest didn't match"},
		"exchanged values":      {func(f *forger) { f.quote.PCRs[4], f.quote.PCRs[7] = f.quote.PCRs[7], f.quote.PCRs[4] }, "quote digest didn't match"},
		"a value moved over":    {func(f *forger) { f.info.PCRDigest.Buffer = make([]byte, 32) }, "quote digest didn't match"},
		"values of another boot": {func(f *forger) {
			f.quote.PCRs[7] = bytes.Repeat([]byte{7}, 32)
			f.digest(4, 7, 11)
		}, "PCR 7"},
	} {
		refused(t, name, ordinary.verify(forge(t, e, c.change)), c.reason)
	}
	refused(t, "empty nonce demanded", demand{nil, crypto.SHA256, ordinary.pcrs}.verify(forge(t, e, func(f *forger) { f.attest.ExtraData.Buffer = nil })), "nonce")
}

// TestForgedSignature: the signature is that key's, over that statement.
func TestForgedSignature(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	e, other := collect(t, m, ordinary), collect(t, m, ordinary)
	later := collect(t, m, demand{[]byte("a later nonce"), crypto.SHA256, ordinary.pcrs})
	for name, change := range map[string]func(*attest.Evidence){
		"another key":           func(e *attest.Evidence) { e.Quote.AKPublic = other.Quote.AKPublic },
		"another's signature":   func(e *attest.Evidence) { e.Quote.Signature = other.Quote.Signature },
		"none":                  func(e *attest.Evidence) { e.Quote.Signature = nil },
		"altered":               func(e *attest.Evidence) { e.Quote.Signature[len(e.Quote.Signature)-1] ^= 1 },
		"truncated":             func(e *attest.Evidence) { e.Quote.Signature = e.Quote.Signature[:10] },
		"an altered statement":  func(e *attest.Evidence) { e.Quote.Attest[len(e.Quote.Attest)-1] ^= 1 },
		"the clock, altered":    func(e *attest.Evidence) { e.Quote.Attest[bytes.Index(e.Quote.Attest, nonce)+len(nonce)] ^= 1 },
		"no statement":          func(e *attest.Evidence) { e.Quote.Attest = nil },
		"a truncated statement": func(e *attest.Evidence) { e.Quote.Attest = e.Quote.Attest[:30] },
		"a replayed quote":      func(e *attest.Evidence) { e.Quote = later.Quote },
		"more than a statement": func(e *attest.Evidence) { e.Quote.Attest = append(e.Quote.Attest, 0) },
	} {
		forged := *e
		forged.Quote.Attest, forged.Quote.Signature = slices.Clone(e.Quote.Attest), slices.Clone(e.Quote.Signature)
		change(&forged)
		refused(t, name, ordinary.verify(&forged), "quote: ")
	}
}

// TestForgedLog: each quoted value replays from its events, and none is extended
// without events.
func TestForgedLog(t *testing.T) {
	e := collect(t, tpmtest.New(t, simboot.Baseline(simboot.UKI)), ordinary)
	for name, c := range map[string]struct {
		change func(*eventlog.Log)
		reason string
	}{
		"dropped":        {func(l *eventlog.Log) { i := last(l, 7); l.Events = slices.Delete(l.Events, i, i+1) }, "PCR 7"},
		"added":          {func(l *eventlog.Log) { l.Append(l.Events[last(l, 4):][:1]) }, "PCR 4"},
		"added at first": {func(l *eventlog.Log) { l.Events = slices.Insert(l.Events, 0, l.Events[last(l, 11)]) }, "PCR 11"},
		"reordered":      {func(l *eventlog.Log) { i := last(l, 11); l.Events[i], l.Events[i-1] = l.Events[i-1], l.Events[i] }, "PCR 11"},
		"digest altered": {func(l *eventlog.Log) { alter(l.Events[last(l, 7)], crypto.SHA256) }, "PCR 7"},
		"to another PCR": {func(l *eventlog.Log) { l.Events[last(l, 7)].PCR = 4 }, "PCR 4, 7"},
		"all dropped": {func(l *eventlog.Log) {
			l.Events = slices.DeleteFunc(l.Events, func(e eventlog.Event) bool { return e.PCR == 7 })
		}, "no event at all for PCR 7"},
		"empty":           {func(l *eventlog.Log) { l.Events = nil }, "no event at all for PCR 4, 7, 11"},
		"bank dropped":    {func(l *eventlog.Log) { *l = *l.Only(crypto.SHA384) }, "sha256"},
		"locality raised": {func(l *eventlog.Log) { l.Events = slices.Insert(l.Events, 0, locality(l, 9)) }, "startup locality 9"},
	} {
		refused(t, name, ordinary.verify(edit(t, e, c.change)), c.reason)
	}
	for name, log := range map[string][]byte{"none": nil, "truncated": e.FirmwareLog[:len(e.FirmwareLog)-1], "text": []byte("no events")} {
		forged := *e
		forged.FirmwareLog = log
		refused(t, name, ordinary.verify(&forged), "firmware event log: ")
	}
	for name, change := range map[string]func(*eventlog.Log){ // what Verify does not prove, as it says
		"a PCR that was not quoted": func(l *eventlog.Log) { alter(l.Events[last(l, 5)], crypto.SHA256) },
		"another bank's digest":     func(l *eventlog.Log) { alter(l.Events[last(l, 7)], crypto.SHA384) },
		"type and data": func(l *eventlog.Log) {
			i := last(l, 7)
			l.Events[i].UntrustedType, l.Events[i].UntrustedData = 13, []byte("x")
		},
	} {
		if err := ordinary.verify(edit(t, e, change)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// last returns the index of a PCR's last event.
func last(l *eventlog.Log, pcr int) int {
	for i, event := range slices.Backward(l.Events) {
		if event.PCR == pcr {
			return i
		}
	}
	return -1
}

func alter(e eventlog.Event, bank crypto.Hash) {
	for i := range e.Digests {
		if e.Digests[i].Hash == bank {
			e.Digests[i].Value[0] ^= 1
		}
	}
}

func locality(l *eventlog.Log, n byte) eventlog.Event {
	return eventlog.Informational(l.Banks, 0, append([]byte("StartupLocality\x00"), n))
}

// TestUserspaceLog: the events of user space are replayed after the firmware's. If they
// are left out, altered or invented, the log does not lead to the quoted value.
func TestUserspaceLog(t *testing.T) {
	m := tpmtest.New(t, phased())
	e := collect(t, m, ordinary)
	if err := ordinary.verify(e); err != nil || len(e.UserspaceLog) == 0 {
		t.Fatalf("%d bytes, %v", len(e.UserspaceLog), err)
	}
	records := bytes.SplitAfter(e.UserspaceLog, []byte{'\n'})
	for name, c := range map[string]struct {
		log    []byte
		reason string
	}{
		"left out":  {nil, "PCR 11"},
		"one less":  {bytes.Join(records[1:], nil), "PCR 11"},
		"one more":  {append(slices.Clone(e.UserspaceLog), records[0]...), "PCR 11"},
		"reordered": {bytes.Join([][]byte{records[1], records[0], records[2], records[3]}, nil), "PCR 11"},
		"garbage":   {[]byte("not JSON"), "userspace event log: "},
		"cut off":   {e.UserspaceLog[:len(e.UserspaceLog)-3], "userspace event log: "},
		"no digest": {bytes.ReplaceAll(e.UserspaceLog, []byte(`"sha256"`), []byte(`"sha257"`)), "no sha256 digest"},
	} {
		forged := *e
		forged.UserspaceLog = c.log
		refused(t, name, ordinary.verify(&forged), c.reason)
	}
	m.Reboot(simboot.Baseline(simboot.UKI))
	plain := collect(t, m, ordinary)
	if err := ordinary.verify(plain); err != nil || plain.UserspaceLog != nil {
		t.Errorf("without a userspace log: %v", err)
	}
	plain.UserspaceLog = e.UserspaceLog
	refused(t, "invented", ordinary.verify(plain), "PCR 11")
}

// TestUserspaceLogWithoutSomeBanks: systemd logs only the banks that it extends, so a
// bank that was not quoted may be missing.
func TestUserspaceLogWithoutSomeBanks(t *testing.T) {
	m := tpmtest.New(t, phased())
	for _, c := range []struct {
		drop string
		bank crypto.Hash
		ok   bool
	}{
		{"sha1", crypto.SHA256, true}, {"sha384", crypto.SHA256, true}, {"sha256", crypto.SHA384, true}, {"sha384", crypto.SHA384, false},
	} {
		d := demand{nonce, c.bank, ordinary.pcrs}
		e := collect(t, m, d)
		e.UserspaceLog = bytes.ReplaceAll(e.UserspaceLog, []byte(`"hashAlg":"`+c.drop+`"`), []byte(`"hashAlg":"sha0"`))
		if err := d.verify(e); (err == nil) != c.ok {
			t.Errorf("without %s, quoted %v: %v", c.drop, c.bank, err)
		}
	}
}

// TestBanksThatOthersDoNotKnow: a log with a bank that go-attestation cannot read
// verifies in the quoted bank, and only if that bank replays.
func TestBanksThatOthersDoNotKnow(t *testing.T) {
	for _, boot := range []simboot.Boot{simboot.Baseline(simboot.UKI), phased()} {
		e := collect(t, tpmtest.New(t, boot), ordinary)
		for name, bank := range map[string]crypto.Hash{"SM3": eventlog.SM3, "SHA3-256": crypto.SHA3_256} {
			with := edit(t, e, func(l *eventlog.Log) {
				l.Banks = append(l.Banks, bank)
				for i := range l.Events {
					l.Events[i].Digests = append(l.Events[i].Digests, eventlog.Digest{Hash: bank, Value: make([]byte, 32)})
				}
			})
			if err := ordinary.verify(with); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			forged := edit(t, with, func(l *eventlog.Log) { alter(l.Events[last(l, 11)], crypto.SHA256) })
			refused(t, name, ordinary.verify(forged), "PCR 11")
			odd := edit(t, with, func(l *eventlog.Log) { alter(l.Events[last(l, 11)], bank) })
			if err := ordinary.verify(odd); err != nil {
				t.Errorf("%s: the bank was not quoted: %v", name, err)
			}
		}
	}
}

// TestGoAttestationIsAsked: a log that our own replay accepts and go-attestation's
// refuses. go-attestation takes every event that begins with StartupLocality for a
// locality.
func TestGoAttestationIsAsked(t *testing.T) {
	d := demand{nonce, crypto.SHA256, []int{0, 4, 7}}
	for _, boot := range []simboot.Boot{simboot.Baseline(simboot.UKI), phased()} {
		e := collect(t, tpmtest.New(t, boot), d)
		if err := d.verify(e); err != nil {
			t.Fatal(err)
		}
		odd := edit(t, e, func(l *eventlog.Log) {
			l.Events = slices.Insert(l.Events, 0, eventlog.Informational(l.Banks, 0, []byte("StartupLocality!\x03")))
		})
		refused(t, "PCR 0", d.verify(odd), "go-attestation's replay disagrees")
	}
}
