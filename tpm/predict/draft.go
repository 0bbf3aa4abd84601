package predict

import (
	"bytes"
	"crypto"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

type bank = crypto.Hash

// draft is the next boot's log under construction. The events of the running boot keep their
// places; a replacement takes the place of its event.
type draft struct {
	old   *eventlog.Log
	banks []bank
	slots [][]eventlog.Event
	// unknown holds the PCRs that cannot be predicted, each with the reason.
	unknown map[int]error
	// forbidden is the next content of dbx, or nil if dbx does not change.
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

// known returns the event with the digests of the computable banks only.
func (d *draft) known(e eventlog.Event) eventlog.Event {
	e.Digests = slices.DeleteFunc(slices.Clone(e.Digests), func(g eventlog.Digest) bool { return !slices.Contains(d.banks, g.Hash) })
	return e
}

func (d *draft) events() []eventlog.Event { return slices.Concat(d.slots...) }

// measure replaces the content that event i measures by the concatenated parts. The event's
// data stays, because it names the content.
func (d *draft) measure(i int, parts ...[]byte) {
	d.slots[i][0].Digests = d.digests(parts...)
}

// measureText replaces the content that event i measures, and its data too.
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

// lose notes that a PCR cannot be predicted. It keeps the first reason.
func (d *draft) lose(pcr int, format string, args ...any) {
	if d.unknown[pcr] == nil {
		d.unknown[pcr] = refuse(pcr, format, args...)
	}
}

// finish returns the log without the PCRs that cannot be predicted.
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

// indexes returns the places of the events that extend a PCR and satisfy is.
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

// sameDigests compares two events in all computable banks.
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

// userspace returns the place of the first event after the firmware's "Exit Boot Services"
// action: systemd's events, if any, are appended behind it. Without that action it is the
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
