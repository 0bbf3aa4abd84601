package attest

import (
	"crypto"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// MaxEvidence bounds saved evidence, in bytes: a log and some quotes.
const MaxEvidence = eventlog.MaxSize + 1<<16

// Saved evidence is a message Attestation of go-tpm-tools (proto/attest.proto,
// proto/tpm.proto), in protobuf's binary form. kleidi writes these fields and reads no
// others: the message's own Go package needs three modules for confidential computing.
const (
	fieldAKPublic = 1 // Attestation.ak_pub, a TPMT_PUBLIC
	fieldQuotes   = 2 // Attestation.quotes
	fieldEventLog = 3 // Attestation.event_log

	fieldStatement = 1 // Quote.quote, a TPMS_ATTEST
	fieldSignature = 2 // Quote.raw_sig, a TPMT_SIGNATURE
	fieldValues    = 3 // Quote.pcrs

	fieldHash = 1 // PCRs.hash, a TPM_ALG_ID
	fieldPCRs = 2 // PCRs.pcrs, a map

	fieldKey   = 1 // of an entry of a map
	fieldValue = 2
)

// Marshal returns evidence to be saved, for [ParseEvidence] and for others' verifiers.
// The format has one log: userspace events follow the firmware's there, and the log then
// has the quoted bank alone, since systemd may leave others out.
func (e *Evidence) Marshal() ([]byte, error) {
	log := e.FirmwareLog
	if len(e.UserspaceLog) > 0 {
		merged, err := parseLogs(e.FirmwareLog, e.UserspaceLog)
		if err != nil {
			return nil, err
		}
		log = merged.Only(e.Quote.Bank).Encode()
	}
	var values []byte
	values = protowire.AppendTag(values, fieldHash, protowire.VarintType)
	values = protowire.AppendVarint(values, uint64(authpolicy.Banks[e.Quote.Bank]))
	for _, pcr := range slices.Sorted(maps.Keys(e.Quote.PCRs)) {
		entry := protowire.AppendTag(nil, fieldKey, protowire.VarintType)
		entry = protowire.AppendVarint(entry, uint64(pcr))
		values = appendBytes(values, fieldPCRs, appendBytes(entry, fieldValue, e.Quote.PCRs[pcr]))
	}
	quote := appendBytes(nil, fieldStatement, e.Quote.Attest)
	quote = appendBytes(quote, fieldSignature, e.Quote.Signature)
	quote = appendBytes(quote, fieldValues, values)
	b := appendBytes(nil, fieldAKPublic, e.Quote.AKPublic)
	b = appendBytes(b, fieldQuotes, quote)
	return appendBytes(b, fieldEventLog, log), nil
}

func appendBytes(b []byte, field protowire.Number, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), value)
}

// ParseEvidence reads saved evidence of at most [MaxEvidence] bytes. Of several quotes it
// takes that over the bank, of which there has to be one. Nothing in the result is to be
// believed before Verify. Unknown fields, such as others' certificates, are passed over.
func ParseEvidence(b []byte, bank crypto.Hash) (*Evidence, error) {
	if len(b) > MaxEvidence {
		return nil, fmt.Errorf("saved evidence: more than %d bytes", MaxEvidence)
	}
	e, found := &Evidence{}, 0
	var key []byte
	err := eachField(b, func(field protowire.Number, value []byte, _ uint64) error {
		switch field {
		case fieldAKPublic:
			return once(&key, value)
		case fieldEventLog:
			return once(&e.FirmwareLog, value)
		case fieldQuotes:
			q, err := parseQuote(value)
			if err == nil && q.Bank == bank {
				found++
				e.Quote = *q
			}
			return err
		}
		return nil
	})
	switch {
	case err != nil:
		return nil, fmt.Errorf("saved evidence: %w", err)
	case found != 1:
		return nil, fmt.Errorf("saved evidence: it has %d quotes over %s, want one", found, eventlog.BankName(bank))
	}
	e.Quote.AKPublic = key
	return e, nil
}

// Nonce returns what the quote says it was made for. Compare it with a nonce that you
// chose: as it stands it proves nothing.
func (e *Evidence) Nonce() ([]byte, error) {
	a, err := tpm2.Unmarshal[tpm2.TPMSAttest](e.Quote.Attest)
	if err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	return a.ExtraData.Buffer, nil
}

func parseQuote(b []byte) (*tpm.Quote, error) {
	q := &tpm.Quote{PCRs: map[int][]byte{}}
	err := eachField(b, func(field protowire.Number, value []byte, _ uint64) error {
		switch field {
		case fieldStatement:
			return once(&q.Attest, value)
		case fieldSignature:
			return once(&q.Signature, value)
		case fieldValues:
			return parseValues(value, q)
		}
		return nil
	})
	return q, err
}

func parseValues(b []byte, q *tpm.Quote) error {
	return eachField(b, func(field protowire.Number, value []byte, number uint64) error {
		switch field {
		case fieldHash:
			for bank, id := range authpolicy.Banks { // others stay 0, which no one asks for
				if uint64(id) == number {
					q.Bank = bank
				}
			}
		case fieldPCRs:
			return parseValue(value, q.PCRs)
		}
		return nil
	})
}

func parseValue(b []byte, pcrs map[int][]byte) error {
	pcr, digest := uint64(0), []byte(nil)
	err := eachField(b, func(field protowire.Number, value []byte, number uint64) error {
		switch field {
		case fieldKey:
			pcr = number
		case fieldValue:
			return once(&digest, value)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if pcr >= eventlog.NumPCRs || pcrs[int(pcr)] != nil || digest == nil {
		return fmt.Errorf("PCR %d does not exist, stands twice or has no value", pcr)
	}
	pcrs[int(pcr)] = digest
	return nil
}

// once keeps a value that may stand once: protobuf lets the last one win, and another
// reader the first.
func once(to *[]byte, value []byte) error {
	if *to != nil {
		return errors.New("a field stands twice")
	}
	*to = value
	return nil
}

// eachField calls f with every field of a message: with its bytes, or with its number.
func eachField(b []byte, f func(field protowire.Number, value []byte, number uint64) error) error {
	for len(b) > 0 {
		field, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		var value []byte
		var number uint64
		switch typ {
		case protowire.BytesType:
			value, n = protowire.ConsumeBytes(b)
			value = append([]byte{}, value...)
		case protowire.VarintType:
			number, n = protowire.ConsumeVarint(b)
		default:
			n = protowire.ConsumeFieldValue(field, typ, b)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if err := f(field, value, number); err != nil {
			return err
		}
	}
	return nil
}
