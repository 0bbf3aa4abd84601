package eventlog

import (
	"crypto"
	"encoding/hex"
	"fmt"
	"slices"
)

// Summary is a slot's record of one event of the boot in which the slot was made, so
// that a later refusal can say what changed. Digest is proven if [ReplaySummary] gives
// the PCR values in the slot's authorization policy. The other fields are for display.
type Summary struct {
	PCR int `json:"pcr"`
	// Type is the event type's name, as the log claims it.
	Type string `json:"type"`
	// Digest is in the summarized bank, in hexadecimal.
	Digest string `json:"digest"`
	// What describes the measured thing, in at most 160 printable runes.
	What string `json:"what"`
}

// Summarize returns the events that extended the given PCRs, in their order,
// with their digests of that bank. An event takes 100 to 400 bytes of JSON.
func (l *Log) Summarize(bank crypto.Hash, pcrs []int) []Summary {
	var s []Summary
	for _, e := range l.Events {
		if !e.extends() || !slices.Contains(pcrs, e.PCR) {
			continue
		}
		s = append(s, Summary{e.PCR, e.UntrustedType.String(), hex.EncodeToString(e.Digest(bank)), describe(e)})
	}
	return s
}

// ReplaySummary extends the summarized digests and returns the values of all PCRs that
// have events, as [Log.Replay] does. The locality is that of [Log.StartupLocality]; it
// matters only for PCR 0.
func ReplaySummary(summaries []Summary, bank crypto.Hash, locality byte) (PCRs, error) {
	if !bank.Available() {
		return nil, fmt.Errorf("cannot compute %s", BankName(bank))
	}
	pcrs := PCRs{}
	if locality != 0 {
		pcrs[0] = resetValue(bank, locality)
	}
	for i, s := range summaries {
		digest, err := hex.DecodeString(s.Digest)
		if err != nil || len(digest) != size(bank) || s.PCR < 0 || s.PCR >= NumPCRs {
			return nil, fmt.Errorf("recorded event %d on PCR %d: no %s digest", i, s.PCR, BankName(bank))
		}
		pcrs.extend(bank, s.PCR, digest)
	}
	return pcrs, nil
}
