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

// startupLocality opens the data of the event that tells PCR 0's first value;
// one byte follows (TCG PFP, 10.4.5.3).
const startupLocality = "StartupLocality\x00"

// StartupLocality returns the locality that the TPM was started from, which is
// the last byte of PCR 0's reset value: 0, 3, or 4 after an H-CRTM. It fails on
// a log that says so twice, or after PCR 0 was extended, because replays would
// then disagree on what it means.
func (l *Log) StartupLocality() (byte, error) {
	var locality byte
	var said, extended bool
	for i, e := range l.Events {
		switch {
		case e.PCR == 0 && e.extends():
			extended = true
		case e.PCR != 0 || len(e.UntrustedData) != len(startupLocality)+1 || !bytes.HasPrefix(e.UntrustedData, []byte(startupLocality)):
		case said || extended:
			return 0, fmt.Errorf("event log: event %d: startup locality given twice or after PCR 0 was extended", i)
		default:
			said, locality = true, e.UntrustedData[len(startupLocality)]
			if locality > 4 {
				return 0, fmt.Errorf("event log: event %d: startup locality %d does not exist", i, locality)
			}
		}
	}
	return locality, nil
}

// Replay extends the events of one bank and returns the values of all PCRs that
// have any. EV_NO_ACTION events are not extended; PCR 0 starts from the startup
// locality. PCRs without events are left out, but for a PCR 0 whose reset value
// is not zero.
func (l *Log) Replay(bank crypto.Hash) (PCRs, error) {
	if !bank.Available() {
		return nil, fmt.Errorf("event log: cannot compute %s; choose sha256 or sha384", BankName(bank))
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
		if e.PCR < 0 || e.PCR >= NumPCRs || len(digest) != size(bank) {
			return nil, fmt.Errorf("event log: event %d on PCR %d has no %s digest", i, e.PCR, BankName(bank))
		}
		pcrs.extend(bank, e.PCR, digest)
	}
	return pcrs, nil
}

// resetValue is all zeros but for the locality in the last byte.
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

// MismatchError says which quoted PCRs the log does not lead to.
type MismatchError struct {
	Bank crypto.Hash
	// PCRs do not replay to the quoted value, ascending.
	PCRs []int
	// Silent are those of PCRs that the log has no event for, though they were extended.
	Silent []int
}

func (e *MismatchError) Error() string {
	s := fmt.Sprintf("the event log does not lead to the quoted value of PCR %s (%s)", join(e.PCRs), BankName(e.Bank))
	if len(e.Silent) > 0 {
		s += fmt.Sprintf("; it has no event at all for PCR %s", join(e.Silent))
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

// Verify proves the digests of one bank, in this order: there is something to
// prove; the log replays; every quoted PCR that has events replays to exactly
// the quoted value; every quoted PCR without events still has its reset value
// (zeros; ones for the PCRs of a dynamic launch, 17 to 22). It proves nothing
// about PCRs that were not quoted, about other banks, or about types and data.
// If values differ, the error is a [*MismatchError] that lists all of them.
func (l *Log) Verify(bank crypto.Hash, quoted PCRs) error {
	if len(quoted) == 0 {
		return errors.New("event log: no PCR was quoted")
	}
	replayed, err := l.Replay(bank)
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
		if !ok {
			mismatch.Silent = append(mismatch.Silent, pcr)
		}
	}
	if len(mismatch.PCRs) > 0 {
		return mismatch
	}
	return nil
}

// unextended is a PCR's value after a reset of the platform (TCG PC Client
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
