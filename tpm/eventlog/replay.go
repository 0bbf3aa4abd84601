package eventlog

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// PCRs are PCR values of one bank, by PCR.
type PCRs map[int][]byte

// startupLocality begins the data of the event that gives the first value of PCR 0; one
// byte follows (TCG PFP, 10.4.5.3).
const startupLocality = "StartupLocality\x00"

// locality returns the startup locality in an event; ok is false for any other event.
// The entry may be larger than the structure: coreboot logs entries of a fixed size.
func (e Event) locality() (locality byte, ok bool) {
	rest, ok := bytes.CutPrefix(e.UntrustedData, []byte(startupLocality))
	if !ok || e.PCR != 0 || e.UntrustedType != NoAction || len(rest) == 0 {
		return 0, false
	}
	return rest[0], true
}

// StartupLocality returns the locality from which the TPM was started, the last byte of
// PCR 0's reset value: 0, 3, or 4 after an H-CRTM. It fails on a log that gives a
// locality twice, or after PCR 0 was extended, because parsers would then disagree on
// the meaning.
func (l *Log) StartupLocality() (byte, error) {
	var locality byte
	var found, extended bool
	for i, e := range l.Events {
		value, ok := e.locality()
		switch {
		case e.PCR == 0 && e.extends():
			extended = true
		case !ok:
		case found || extended:
			return 0, fmt.Errorf("event log: event %d: startup locality given twice or after PCR 0 was extended", i)
		case value > 4:
			return 0, fmt.Errorf("event log: event %d: startup locality %d does not exist", i, value)
		default:
			found, locality = true, value
		}
	}
	return locality, nil
}

// HasPaddedLocality reports whether the startup locality is in an entry that is larger
// than its structure.
func (l *Log) HasPaddedLocality() bool { return slices.ContainsFunc(l.Events, Event.padded) }

func (e Event) padded() bool {
	_, ok := e.locality()
	return ok && len(e.UntrustedData) > len(startupLocality)+1
}

// WithoutPadding returns the log with the startup locality in an entry of the
// structure's size, as other parsers demand.
func (l *Log) WithoutPadding() *Log {
	trimmed := &Log{Banks: l.Banks, spec: l.spec, Events: slices.Clone(l.Events)}
	for i, e := range trimmed.Events {
		if e.padded() {
			trimmed.Events[i].UntrustedData = e.UntrustedData[:len(startupLocality)+1]
		}
	}
	return trimmed
}

// BankError says that a log has no digests of a bank at all.
type BankError struct {
	Bank crypto.Hash
	// Has are the banks in the log's header.
	Has []crypto.Hash
}

func (e *BankError) Error() string {
	names := make([]string, len(e.Has))
	for i, bank := range e.Has {
		names[i] = BankName(bank)
	}
	return fmt.Sprintf("the event log has no %s digests; it has %s", BankName(e.Bank), strings.Join(names, ", "))
}

// IncompleteError says that an event which extended a PCR has no digest of a bank
// that other events have.
type IncompleteError struct {
	Bank       crypto.Hash
	Event, PCR int
}

func (e *IncompleteError) Error() string {
	return fmt.Sprintf("event log: event %d on PCR %d has no %s digest", e.Event, e.PCR, BankName(e.Bank))
}

// Replay extends the events of one bank and returns the values of all PCRs that have
// events. It skips events that extended nothing: EV_NO_ACTION, and events on PCRs that
// do not exist. PCR 0 starts from the startup locality. PCRs without events have no
// value, except a PCR 0 whose reset value is not zero. Every event that extended a PCR
// needs a digest of the bank; otherwise the error is a [*BankError] or an
// [*IncompleteError].
func (l *Log) Replay(bank crypto.Hash) (PCRs, error) {
	return l.replay(bank, func(int, []byte) {})
}

// replay calls step with each value that a PCR passes through, including the first.
func (l *Log) replay(bank crypto.Hash, step func(pcr int, value []byte)) (PCRs, error) {
	switch {
	case !bank.Available():
		return nil, fmt.Errorf("event log: cannot compute %s; choose sha256 or sha384", BankName(bank))
	case !slices.Contains(l.Banks, bank):
		return nil, &BankError{bank, l.Banks}
	}
	locality, err := l.StartupLocality()
	if err != nil {
		return nil, err
	}
	pcrs := PCRs{}
	if locality != 0 {
		pcrs[0] = resetValue(bank, locality)
	}
	for i, e := range l.Events {
		if !e.extends() {
			continue
		}
		digest := e.Digest(bank)
		if len(digest) != size(bank) {
			return nil, &IncompleteError{bank, i, e.PCR}
		}
		if pcrs[e.PCR] == nil {
			pcrs[e.PCR] = resetValue(bank, 0)
		}
		step(e.PCR, pcrs[e.PCR])
		pcrs.extend(bank, e.PCR, digest)
	}
	return pcrs, nil
}

// resetValue is all zeros except the last byte, which is the locality.
func resetValue(bank crypto.Hash, locality byte) []byte {
	b := make([]byte, size(bank))
	b[len(b)-1] = locality
	return b
}

func (p PCRs) extend(bank crypto.Hash, pcr int, digest []byte) {
	if p[pcr] == nil {
		p[pcr] = resetValue(bank, 0)
	}
	p[pcr] = sum(bank, p[pcr], digest)
}

// MismatchError lists the quoted PCRs that the log does not lead to.
type MismatchError struct {
	Bank crypto.Hash
	// PCRs do not replay to the quoted value, ascending.
	PCRs []int
	// Silent are those of PCRs that were extended although the log has no event for
	// them.
	Silent []int
	// Behind are those of PCRs whose quoted value the log passes through before its
	// end: the TPM has measured less than the log lists.
	Behind []int
}

// TPMIsBehind reports whether the TPM holds an earlier state of the boot that the log
// lists. A machine that resumed from hibernation is in that condition: its memory comes
// from the earlier boot, and its TPM has been reset since.
func (e *MismatchError) TPMIsBehind() bool { return len(e.PCRs) > 0 && slices.Equal(e.Behind, e.PCRs) }

func (e *MismatchError) Error() string {
	s := fmt.Sprintf("the event log does not lead to the quoted value of PCR %s (%s)", join(e.PCRs), BankName(e.Bank))
	if len(e.Silent) > 0 {
		s += fmt.Sprintf("; it has no event at all for PCR %s", join(e.Silent))
	}
	if e.TPMIsBehind() {
		s += "; it goes further: the TPM has measured less than the log lists"
	}
	return s
}

func join(pcrs []int) string {
	s := make([]string, len(pcrs))
	for i, p := range pcrs {
		s[i] = fmt.Sprint(p)
	}
	return strings.Join(s, ", ")
}

// Verify proves the digests of one bank, in this order: there is something to prove;
// the log replays; every quoted PCR that has events replays to exactly the quoted
// value; every quoted PCR without events still has its reset value (zeros; ones for the
// PCRs of a dynamic launch, 17 to 22). It proves nothing about PCRs that were not
// quoted, about other banks, or about types and data. If values differ, the error is a
// [*MismatchError] that lists all differences.
func (l *Log) Verify(bank crypto.Hash, quoted PCRs) error {
	if len(quoted) == 0 {
		return errors.New("event log: no PCR was quoted")
	}
	passed := map[int]bool{}
	replayed, err := l.replay(bank, func(pcr int, value []byte) {
		passed[pcr] = passed[pcr] || bytes.Equal(value, quoted[pcr])
	})
	if err != nil {
		return err
	}
	mismatch := &MismatchError{Bank: bank}
	for _, pcr := range slices.Sorted(maps.Keys(quoted)) {
		want, ok := replayed[pcr]
		if !ok {
			want = unextended(bank, pcr)
		}
		if bytes.Equal(quoted[pcr], want) {
			continue
		}
		mismatch.PCRs = append(mismatch.PCRs, pcr)
		switch {
		case !ok:
			mismatch.Silent = append(mismatch.Silent, pcr)
		case passed[pcr]:
			mismatch.Behind = append(mismatch.Behind, pcr)
		}
	}
	if len(mismatch.PCRs) > 0 {
		return mismatch
	}
	return nil
}

// unextended returns a PCR's value after a reset of the platform (TCG PC Client
// Platform TPM Profile, table 5).
func unextended(bank crypto.Hash, pcr int) []byte {
	b := make([]byte, size(bank))
	if pcr >= 17 && pcr <= 22 {
		for i := range b {
			b[i] = 0xff
		}
	}
	return b
}
