package eventlog

import "slices"

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
