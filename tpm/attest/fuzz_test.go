package attest_test

import (
	"bytes"
	"slices"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// FuzzVerify: evidence may come from anybody. No byte of it ends the process, and
// verified evidence is a statement over the nonce and the demanded PCRs, whose values
// the log leads to.
func FuzzVerify(f *testing.F) {
	m := tpmtest.New(f, phased())
	a := attest.Attester{Device: m.TPM(), Logs: attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}}
	for _, b := range []simboot.Boot{simboot.Baseline(simboot.GRUB), phased()} {
		m.Reboot(b)
		e, err := a.Collect(f.Context(), nil, ordinary.nonce, ordinary.bank, ordinary.pcrs)
		if err != nil {
			f.Fatal(err)
		}
		e.FirmwareLog = shorten(f, e.FirmwareLog)
		if _, err := ordinary.result(e); err != nil {
			f.Fatalf("the seed is refused: %v", err)
		}
		values := append(append(bytes.Clone(e.Quote.PCRs[4]), e.Quote.PCRs[7]...), e.Quote.PCRs[11]...)
		f.Add(e.Quote.AKPublic, e.Quote.Attest, e.Quote.Signature, values, e.FirmwareLog, e.UserspaceLog)
	}
	f.Fuzz(func(t *testing.T, ak, statement, signature, values, firmware, userspace []byte) {
		q := keys.Quote{AKPublic: ak, Attest: statement, Signature: signature, Bank: ordinary.bank, PCRs: map[int][]byte{}}
		for i, pcr := range ordinary.pcrs {
			q.PCRs[pcr] = values[min(32*i, len(values)):min(32*(i+1), len(values))]
		}
		r, err := ordinary.result(&attest.Evidence{Quote: q, FirmwareLog: firmware, UserspaceLog: userspace})
		if err != nil {
			return
		}
		if err := r.Log.Verify(ordinary.bank, eventlog.PCRs(q.PCRs)); err != nil {
			t.Error(err)
		}
		selection := tpm2.Marshal(authpolicy.Selection(ordinary.bank, ordinary.pcrs))
		if !bytes.Contains(statement, ordinary.nonce) || !bytes.Contains(statement, selection) {
			t.Error("another statement verifies")
		}
	})
}

// shorten keeps only the events that Verify replays, so that the fuzzer spends its time
// on them.
func shorten(f *testing.F, raw []byte) []byte {
	log, err := eventlog.Parse(raw)
	if err != nil {
		f.Fatal(err)
	}
	log = log.Only(ordinary.bank)
	log.Events = slices.DeleteFunc(log.Events, func(e eventlog.Event) bool { return !slices.Contains(ordinary.pcrs, e.PCR) })
	for i := range log.Events {
		log.Events[i].UntrustedData = nil
	}
	return log.Encode()
}

func (d demand) result(e *attest.Evidence) (*attest.Result, error) {
	return attest.Verify(e, d.nonce, d.bank, d.pcrs)
}
