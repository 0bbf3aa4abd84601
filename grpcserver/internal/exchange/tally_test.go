package exchange

import (
	"errors"
	"net/netip"
	"testing"
	"time"
)

// TestTallyIsBounded: a stranger who varies everything possible adds at most one line
// per check, and hides no other stranger's kind.
func TestTallyIsBounded(t *testing.T) {
	var written []*Verdict
	tally := &Tally{Write: func(v []*Verdict) error { written = append(written, v...); return nil }}
	checks := []string{"node", "cluster", "proof"}
	const peers = 4 * maxTallied
	for i := range peers {
		for _, check := range checks {
			from := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 32)
			tally.Add(Kind{Check: check, From: from}, &Verdict{Check: check, Time: time.Now()})
		}
	}
	tally.Flush()
	total := 0
	for _, v := range written {
		total += v.Count
	}
	if len(written) > maxTallied+len(checks) || total != peers*len(checks) {
		t.Errorf("%d lines for %d refusals", len(written), total)
	}
	if tally.Flush(); tally.timer != nil || len(tally.kinds) != 0 {
		t.Error("something is left")
	}
}

// TestTallyKeepsWhatCantBeWritten: refusals that can't be written stay until they can.
func TestTallyKeepsWhatCantBeWritten(t *testing.T) {
	full := errors.New("no space left on device")
	var written []*Verdict
	tally := &Tally{Write: func(v []*Verdict) error {
		if full == nil {
			written = append(written, v...)
		}
		return full
	}}
	k := Kind{Check: "node"}
	tally.Add(k, &Verdict{})
	tally.Flush()
	if tally.timer == nil {
		t.Error("it is not tried again")
	}
	tally.Add(k, &Verdict{})
	full = nil
	if tally.Flush(); len(written) != 1 || written[0].Count != 2 {
		t.Errorf("%v", written)
	}
}
