package eventlog

import (
	"bytes"
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
// order, as far as their digests prove them. It returns none if systemd measures no
// phases.
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

// Restart is a way in which systemd starts again without a reset of the machine. The
// TPM keeps its PCRs, so the PCRs hold both starts.
type Restart string

// The kinds of restarts.
const (
	NoRestart  Restart = ""
	SoftReboot Restart = "soft-reboot"
	Kexec      Restart = "kexec"
)

// String returns a clause for messages.
func (r Restart) String() string {
	return "systemd shut down and started again without a reset of the machine (" + string(r) + ")"
}

// Restarted returns the first such restart among the phases of the boot.
func (l *Log) Restarted() Restart { return restartIn(l.Phases()) }

// restartIn finds a phase that follows a shutdown. A kernel started by kexec begins
// with an initrd; a soft-reboot does not.
func restartIn(phases []string) Restart {
	down := false
	for _, phase := range phases {
		switch {
		case phase == "shutdown" || phase == "final":
			down = true
		case down && phase == "enter-initrd":
			return Kexec
		case down:
			return SoftReboot
		}
	}
	return NoRestart
}

// maxRestarts bounds the number of soft-reboots that UnloggedPhases tries.
const maxRestarts = 8

// UnloggedPhases returns systemd's log of the phases of a boot, for an older systemd
// (such as 252) that extended PCR 11 without logging the phases. It tries all sequences
// of phases that a boot can go through, soft-reboots included, and returns the sequence
// that leads from the firmware's log to the quoted value. It returns nil if no sequence
// does, or if the log needs none. The result is a guess that the digests prove, as they
// prove every log.
func (l *Log) UnloggedPhases(bank crypto.Hash, quoted PCRs) []byte {
	var mismatch *MismatchError
	if err := l.Verify(bank, quoted); !errors.As(err, &mismatch) || !slices.Equal(mismatch.PCRs, []int{11}) {
		return nil
	}
	for _, first := range []string{"enter-initrd", "sysinit"} { // an initrd without systemd measures no phase
		again := phases[slices.Index(phases, "sysinit"):]
		words := slices.Concat(phases[slices.Index(phases, first):], slices.Repeat(again, maxRestarts))
		if n := l.measuredPhases(bank, quoted[11], words); n > 0 {
			return formatPhases(words[:n], l.Banks)
		}
	}
	return nil
}

// measuredPhases returns how many of the words lead from the log to the value of PCR
// 11, or 0 if none of the counts does.
func (l *Log) measuredPhases(bank crypto.Hash, want []byte, words []string) int {
	pcrs, err := l.Replay(bank)
	if err != nil {
		return 0
	}
	for i, word := range words {
		pcrs.extend(bank, 11, sum(bank, []byte(word)))
		if bytes.Equal(pcrs[11], want) {
			return i + 1
		}
	}
	return 0
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
