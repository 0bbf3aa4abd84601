package attest

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"slices"

	goattest "github.com/google/go-attestation/attest"
	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

func checkQuote(q *keys.Quote, nonce []byte, bank crypto.Hash, pcrs []int) error {
	if q.Bank != bank {
		return errors.New("it is over another PCR bank than demanded")
	}
	a, err := tpm2.Unmarshal[tpm2.TPMSAttest](q.Attest)
	if err != nil {
		return err
	}
	if a.Magic != tpm2.TPMGeneratedValue || a.Type != tpm2.TPMSTAttestQuote {
		return errors.New("it is no statement of a TPM about PCRs")
	}
	if !bytes.Equal(a.ExtraData.Buffer, nonce) {
		return errors.New("it is not fresh: its extraData is not the nonce")
	}
	info, err := a.Attested.Quote()
	if err != nil {
		return err
	}
	if !selects(info.PCRSelect, bank, pcrs) || len(q.PCRs) != len(pcrs) {
		return errors.New("it is not over exactly the demanded PCRs")
	}
	for _, i := range pcrs {
		if len(q.PCRs[i]) != bank.Size() {
			return fmt.Errorf("no value of PCR %d of the bank's size came with it", i)
		}
	}
	return checkSignature(q, nonce)
}

// selects compares the quoted PCRs with the demanded ones: one bank, exactly these
// PCRs.
func selects(got tpm2.TPMLPCRSelection, bank crypto.Hash, pcrs []int) bool {
	want := authpolicy.Selection(bank, pcrs).PCRSelections[0]
	if len(got.PCRSelections) != 1 {
		return false
	}
	s := got.PCRSelections[0]
	return s.Hash == want.Hash && bytes.Equal(bytes.TrimRight(s.PCRSelect, "\x00"), bytes.TrimRight(want.PCRSelect, "\x00"))
}

// checkSignature lets go-attestation verify the signature, the nonce, and that the
// digest of the values was quoted.
func checkSignature(q *keys.Quote, nonce []byte) error {
	ak, err := goattest.ParseAKPublic(q.AKPublic)
	if err != nil {
		return err
	}
	return ak.VerifyAll([]goattest.Quote{{Quote: q.Attest, Signature: q.Signature}}, toPCRs(q.Bank, q.PCRs), nonce)
}

// toPCRs gives go-attestation values of one bank only, because go-attestation accepts a
// log if any one bank matches.
func toPCRs(bank crypto.Hash, values map[int][]byte) []goattest.PCR {
	var out []goattest.PCR
	for i, v := range values {
		out = append(out, goattest.PCR{Index: i, Digest: v, DigestAlg: bank})
	}
	slices.SortFunc(out, func(a, b goattest.PCR) int { return a.Index - b.Index })
	return out
}

// quirks are forms of a log that our parser reads, but go-attestation does not read or
// reads differently. Each quirk says which log go-attestation gets instead.
var quirks = []struct {
	has     func(*eventlog.Log) bool
	instead func(*eventlog.Log, crypto.Hash) *eventlog.Log
}{
	{ // go-attestation refuses the whole log
		func(l *eventlog.Log) bool { return slices.ContainsFunc(l.Banks, unknownToGoAttestation) },
		(*eventlog.Log).Only,
	},
	{ // go-attestation overlooks a startup locality in an entry larger than the structure
		(*eventlog.Log).HasPaddedLocality,
		func(l *eventlog.Log, _ crypto.Hash) *eventlog.Log { return l.WithoutPadding() },
	},
}

// crossCheck replays with go-attestation. go-attestation reads the firmware's own
// bytes, unless the log has one of the quirks. Userspace events may lack some banks, so
// go-attestation gets them in the quoted bank.
func crossCheck(firmware []byte, merged *eventlog.Log, bank crypto.Hash, quoted eventlog.PCRs) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("go-attestation's replay ended in a panic (%T)", p)
		}
	}()
	own, err := eventlog.Parse(firmware)
	if err != nil {
		return err
	}
	raw := firmware
	for _, q := range quirks {
		if q.has(own) {
			own = q.instead(own, bank)
			raw = own.Encode()
		}
	}
	if userspace := merged.Events[len(own.Events):]; len(userspace) > 0 {
		later := &eventlog.Log{Banks: []crypto.Hash{bank}, Events: userspace}
		if raw, err = goattest.AppendEvents(raw, later.Only(bank).Encode()); err != nil {
			return fmt.Errorf("go-attestation does not take the userspace events: %w", err)
		}
	}
	theirs, err := goattest.ParseEventLog(raw)
	if err != nil {
		return fmt.Errorf("go-attestation does not read the event log: %w", err)
	}
	if _, err := theirs.Verify(toPCRs(bank, quoted)); err != nil {
		return fmt.Errorf("go-attestation's replay disagrees: %w", err)
	}
	return nil
}

// unknownToGoAttestation reports whether bank is SM3 or, because of AppendEvents,
// SHA-3.
func unknownToGoAttestation(bank crypto.Hash) bool {
	return !slices.Contains([]crypto.Hash{crypto.SHA1, crypto.SHA256, crypto.SHA384, crypto.SHA512}, bank)
}
