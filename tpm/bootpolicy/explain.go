package bootpolicy

import (
	"bytes"
	"crypto"
	"fmt"
	"strings"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// Backing says how far the digest of an event backs the log's description of it.
type Backing string

// The backings. None of them says that the digest was quoted; only Judge checks that.
const (
	// BackedByDigest: measuring the logged data gives the digest.
	BackedByDigest Backing = "digest"
	// BackedByNothing: the log only names the measured content, such as a file. The
	// name is a claim; the digest can be compared.
	BackedByNothing Backing = "claimed"
	// NotMeasured: the event was not extended at all.
	NotMeasured Backing = "not measured"
)

// Row is one event of a log in readable form.
type Row struct {
	// Event is its index in the log, from 0.
	Event int `json:"event"`
	// PCR is eventlog.NoPCR (-1) if the event names none.
	PCR int `json:"pcr"`
	// UntrustedType is the type that the log claims.
	UntrustedType string `json:"untrustedType"`
	// Digest is hexadecimal; "" if the event has none in this bank.
	Digest string `json:"digest"`
	// What says what was measured, in at most 160 printable runes.
	What   string  `json:"what"`
	Backed Backing `json:"backed"`
}

// Short returns the beginning of the digest.
func (r Row) Short() string { return short(r.Digest) }

// Explain returns a log event by event, with the digests of a bank. It does not judge.
func Explain(log *eventlog.Log, bank crypto.Hash) []Row {
	pcrs := make([]int, eventlog.NumPCRs)
	for i := range pcrs {
		pcrs[i] = i
	}
	log = log.Only(bank)
	what := log.Summarize(bank, pcrs)
	rows := make([]Row, len(log.Events))
	for i, e := range log.Events {
		r := Row{Event: i, PCR: e.PCR, UntrustedType: e.UntrustedType.String(), Backed: NotMeasured}
		switch {
		case e.UntrustedType == eventlog.NoAction:
			r.What = informational(e.UntrustedData)
		case e.PCR < 0 || e.PCR >= eventlog.NumPCRs:
			r.What = "no TPM has this PCR, so nothing was extended"
		default:
			r.What, what = what[0].What, what[1:]
			r.Digest, r.Backed = fmt.Sprintf("%x", e.Digest(bank)), backing(e)
		}
		rows[i] = r
	}
	return rows
}

// informational describes an event that is not measured.
func informational(data []byte) string {
	name, rest, ok := bytes.Cut(data[:min(len(data), 64)], []byte{0})
	switch s := string(name); {
	case s == "StartupLocality" && ok && len(rest) > 0:
		return fmt.Sprintf("the TPM was started from locality %d", rest[0])
	case s != "" && strings.ToValidUTF8(s, "") == s && printable(s, maxNote) == s:
		return s
	}
	return fmt.Sprintf("%d bytes", len(data))
}

// backing tries the parts of the data that firmware and boot loaders are known to measure.
func backing(e eventlog.Event) Backing {
	d := e.UntrustedData
	tries := [][]byte{d, bytes.TrimRight(d, "\x00")}
	if text, ok := grubText(e); ok {
		tries = append(tries, []byte(text), append([]byte(text), 0))
	}
	if _, value, ok := splitVariable(d); ok {
		tries = append(tries, value)
	}
	if len(d) <= 2*maxText {
		if _, ok := provenText(event{Event: e}); ok {
			return BackedByDigest
		}
	}
	for _, t := range tries {
		if e.Proves(t) {
			return BackedByDigest
		}
	}
	return BackedByNothing
}
