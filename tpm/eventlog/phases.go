package eventlog

import (
	"crypto"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// phases are the words that systemd-pcrphase measures into PCR 11, each when the
// boot reaches that phase (systemd-pcrphase.service(8)).
var phases = []string{"enter-initrd", "leave-initrd", "sysinit", "ready", "shutdown", "final"}

// Phases returns the phases of the boot that systemd has measured so far, in their
// order, as far as their digests prove them; none where it measures none.
func (l *Log) Phases() []string {
	var found []string
	for _, e := range l.Events {
		word := string(e.UntrustedData)
		if e.PCR == 11 && e.UntrustedType == EventTag && slices.Contains(phases, word) && e.Proves(e.UntrustedData) {
			found = append(found, word)
		}
	}
	return found
}

// UnloggedPhases returns systemd's log of the phases of a boot, where an older
// systemd (such as 252) extended PCR 11 with them and logged nothing: of all the
// ways in which a boot goes through the phases, the one that leads from the
// firmware's log to the quoted value. nil where none does, or none is needed. It
// is a guess that the digests prove, as they prove every log.
func (l *Log) UnloggedPhases(bank crypto.Hash, quoted PCRs) []byte {
	var mismatch *MismatchError
	if err := l.Verify(bank, quoted); !errors.As(err, &mismatch) || !slices.Equal(mismatch.PCRs, []int{11}) {
		return nil
	}
	for _, first := range []string{"enter-initrd", "sysinit"} { // an initrd without systemd measures none
		begin := slices.Index(phases, first)
		for end := begin + 1; end <= len(phases); end++ {
			raw := formatPhases(phases[begin:end], l.Banks)
			events, err := ParseUserspace(raw)
			if err != nil {
				return nil
			}
			guess := &Log{Banks: l.Banks, Events: append(slices.Clone(l.Events), events...)}
			if guess.Verify(bank, quoted) == nil {
				return raw
			}
		}
	}
	return nil
}

// formatPhases returns the phases in the form of systemd's log, see [ParseUserspace].
func formatPhases(words []string, banks []crypto.Hash) []byte {
	var raw []byte
	for _, word := range words {
		var digests []string
		for _, a := range algorithms {
			if slices.Contains(banks, a.hash) && a.hash.Available() {
				digests = append(digests, fmt.Sprintf(`{"hashAlg":%q,"digest":"%x"}`, a.name, sum(a.hash, []byte(word))))
			}
		}
		raw = append(raw, recordSeparator)
		raw = fmt.Appendf(raw, `{"pcr":11,"digests":[%s],"content_type":"systemd","content":{"string":%q,"eventType":"phase"}}`+"\n", strings.Join(digests, ","), word)
	}
	return raw
}
