package predict

import (
	"bytes"
	"crypto"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

type bank = crypto.Hash

// draft is the next boot's log while it is made. The events of the running boot
// keep their places; what comes instead of one is in its slot.
type draft struct {
	old   *eventlog.Log
	banks []bank
	slots [][]eventlog.Event
	// unknown are the PCRs that cannot be told, and why.
	unknown map[int]error
	// forbidden is the next content of dbx, nil if it stays.
	forbidden []byte
}

func newDraft(log *eventlog.Log) *draft {
	d := &draft{old: log, unknown: map[int]error{}}
	for _, b := range log.Banks {
		if b.Available() {
			d.banks = append(d.banks, b)
		}
	}
	for _, e := range log.Events {
		d.slots = append(d.slots, []eventlog.Event{d.known(e)})
	}
	return d
}

// known returns the event with the digests of the banks that can be computed.
func (d *draft) known(e eventlog.Event) eventlog.Event {
	e.Digests = slices.DeleteFunc(slices.Clone(e.Digests), func(g eventlog.Digest) bool { return !slices.Contains(d.banks, g.Hash) })
	return e
}

func (d *draft) events() []eventlog.Event { return slices.Concat(d.slots...) }

// measure replaces what event i measures by the given parts, one after the other.
// Its data stays: it names what is measured.
func (d *draft) measure(i int, parts ...[]byte) {
	d.slots[i][0].Digests = d.digests(parts...)
}

// measureText replaces what event i measures, and its data with it.
func (d *draft) measureText(i int, measured, data []byte) {
	d.measure(i, measured)
	d.slots[i][0].UntrustedData = data
}

// digests hashes the parts, which are read once for all banks.
func (d *draft) digests(parts ...[]byte) []eventlog.Digest {
	digests := make([]eventlog.Digest, len(d.banks))
	for i, b := range d.banks {
		h := b.New()
		for _, p := range parts {
			h.Write(p)
		}
		digests[i] = eventlog.Digest{Hash: b, Value: h.Sum(nil)}
	}
	return digests
}

// lose notes that a PCR cannot be told. The first reason stays.
func (d *draft) lose(pcr int, format string, args ...any) {
	if d.unknown[pcr] == nil {
		d.unknown[pcr] = refuse(pcr, format, args...)
	}
}

// finish returns the log without the PCRs that are not known.
func (d *draft) finish(pcrs []int) (*eventlog.Log, error) {
	if len(d.banks) == 0 {
		return nil, refuse(-1, "the log has no bank that can be computed")
	}
	for _, pcr := range pcrs {
		if err := d.unknown[pcr]; err != nil {
			return nil, err
		}
	}
	next := *d.old // with its header
	next.Banks = d.banks
	next.Events = slices.DeleteFunc(d.events(), func(e eventlog.Event) bool { return d.unknown[e.PCR] != nil })
	return &next, nil
}

// indexes returns the places of a PCR's events that extend it and are as is says.
func (d *draft) indexes(pcr int, is func(eventlog.Event) bool) []int {
	var at []int
	for i, e := range d.old.Events {
		if e.PCR == pcr && e.UntrustedType != eventlog.NoAction && is(e) {
			at = append(at, i)
		}
	}
	return at
}

func anyEvent(eventlog.Event) bool { return true }

// sameDigests compares events in all banks that can be computed.
func (d *draft) sameDigests(a, b eventlog.Event) bool {
	n := 0
	for _, h := range d.banks {
		x, y := a.Digest(h), b.Digest(h)
		if !bytes.Equal(x, y) {
			return false
		}
		if x != nil {
			n++
		}
	}
	return n > 0
}

// userspace returns the place of the first event that was measured after the
// firmware's and the boot loader's work, by the firmware's own word for that:
// systemd's events, if any, are appended behind it. Without that word it is the
// end of the log.
func userspace(log *eventlog.Log) int {
	for i := len(log.Events) - 1; i >= 0; i-- {
		for _, said := range []string{"Exit Boot Services Returned with Success", "Exit Boot Services Invocation"} {
			if e := log.Events[i]; e.PCR == 5 && e.Proves([]byte(said)) {
				return i + 1
			}
		}
	}
	return len(log.Events)
}

// where names an event in a refusal.
func where(i int, e eventlog.Event) string { return fmt.Sprintf("event %d (%v)", i, e.UntrustedType) }
