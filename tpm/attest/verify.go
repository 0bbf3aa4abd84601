package attest

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// Result is the result of verified evidence.
type Result struct {
	Bank crypto.Hash
	PCRs eventlog.PCRs
	// Log holds the events. Only digests on quoted PCRs are proven.
	Log *eventlog.Log
	// Time is the time of the verification.
	Time time.Time
}

// Verify proves, in this order: the attestation key is a restricted signing key; a TPM
// made the quote with that key, over nonce and exactly the demanded PCRs of the bank;
// the given values are the quoted ones; the logs parse; each quoted value replays from
// its events, and no PCR is extended without events; and go-attestation, which parses
// and replays independently, agrees.
//
// It proves neither which TPM made the quote nor that the boot was a good one.
func Verify(e *Evidence, nonce []byte, bank crypto.Hash, pcrs []int) (*Result, error) {
	if err := checkAK(e.Quote.AKPublic); err != nil {
		return nil, fmt.Errorf("attestation key: %w", err)
	}
	if err := checkQuote(&e.Quote, nonce, bank, pcrs); err != nil {
		return nil, &quoteError{err}
	}
	quoted := eventlog.PCRs(e.Quote.PCRs)
	log, err := VerifyLogs(e.FirmwareLog, e.UserspaceLog, bank, quoted)
	if err != nil {
		return nil, err
	}
	return &Result{Bank: bank, PCRs: quoted, Log: log, Time: time.Now()}, nil
}

// VerifyLogs is the part of Verify that follows the quote: it proves by two replays
// that both logs together lead to these values. The caller must know whether a TPM has
// quoted the values. Userspace may be empty.
func VerifyLogs(firmware, userspace []byte, bank crypto.Hash, quoted eventlog.PCRs) (*eventlog.Log, error) {
	log, err := parseLogs(firmware, userspace)
	if err != nil {
		return nil, err
	}
	if err := log.Verify(bank, quoted); err != nil {
		return nil, err
	}
	if err := crossCheck(firmware, log, bank, quoted); err != nil {
		return nil, &disagreement{err}
	}
	return log, nil
}

func checkAK(public []byte) error {
	p, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
	if err != nil {
		return err
	}
	if !bytes.Equal(tpm2.Marshal(p), public) { // go-attestation parses it too, and must read the same key
		return errors.New("it is not in the form that a TPM gives it")
	}
	a := p.ObjectAttributes
	if !a.Restricted || !a.SignEncrypt || a.Decrypt || !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin {
		return errors.New("it is not a restricted signing key that its TPM made")
	}
	return nil
}
