package bootpolicy

import (
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

func (j *judgement) judgeEvents(pcr int) {
	switch r := j.policy.PCRs[pcr]; {
	case r.Allowed != nil:
		j.judgeAllowed(pcr, r)
	case r.Sequences != nil:
		j.judgeSequences(pcr, r.Sequences)
	}
}

// judgeAllowed demands that each event match an entry. A demanded separator needs no entry.
func (j *judgement) judgeAllowed(pcr int, r Rule) {
	allowed := map[key]bool{}
	for _, e := range r.Allowed {
		for _, k := range e.keys(j.policy.Hash()) {
			allowed[k] = true
		}
	}
	for _, e := range j.events[pcr] {
		if slices.ContainsFunc(e.keys, func(k key) bool { return allowed[k] }) ||
			r.wantsSeparator(pcr) && separatorOf(e.Event) == goodSeparator || j.full() {
			continue
		}
		f := j.change(pcr, nil, &e)
		f.Rule, f.Want = fmt.Sprintf("pcrs.%d.allowed", pcr), fmt.Sprintf("one of the %d that are allowed", len(r.Allowed))
		j.add(f)
	}
}

// judgeSequences demands that one list match all events. If none does, it explains the
// differences of the list with the fewest.
func (j *judgement) judgeSequences(pcr int, sequences [][]Entry) {
	var best []pair
	which := -1
	for i, list := range sequences {
		pairs := j.align(list, j.events[pcr])
		if len(pairs) == 0 {
			return
		}
		if which < 0 || len(pairs) < len(best) {
			best, which = pairs, i
		}
	}
	for _, d := range best {
		if j.full() {
			continue
		}
		var want *Entry
		var got *event
		rule := fmt.Sprintf("pcrs.%d.sequences[%d]", pcr, which)
		if d.a >= 0 {
			want = &sequences[which][d.a]
			rule += fmt.Sprintf("[%d]", d.a)
		}
		if d.b >= 0 {
			got = &j.events[pcr][d.b]
		}
		f := j.change(pcr, want, got)
		f.Rule = rule
		j.add(f)
	}
}

// align returns the changes that make a list match the events.
func (j *judgement) align(list []Entry, events []event) []pair {
	keys := make([][]key, len(list))
	for i, e := range list {
		keys[i] = e.keys(j.policy.Hash())
	}
	return differences(len(list), len(events), func(a, b int) bool {
		return slices.ContainsFunc(keys[a], func(k key) bool { return slices.Contains(events[b].keys, k) })
	})
}

// change describes an event that differs from its entry. Either may be nil: the event is new
// then, or gone.
func (j *judgement) change(pcr int, want *Entry, got *event) Finding {
	f := Finding{PCR: pcr, Event: NoEvent, Next: nextChange}
	var was, now []eventlog.Summary
	if want != nil {
		f.Want = want.String()
		was = []eventlog.Summary{{PCR: pcr, Digest: "want " + want.Value, What: want.Note}}
		if got != nil && want.Note == "" {
			was[0].What = got.what()
		}
	}
	if got != nil {
		digest := fmt.Sprintf("%x", got.digest)
		f.Event, f.Got = got.index, Entry{FormDigest, digest, got.what()}.String()
		now = []eventlog.Summary{{PCR: pcr, Digest: digest, What: got.what()}}
	}
	if pcr != 11 { // what PCR 11 shows of a unified kernel image tells Compare how to word it
		was, now = append(was, j.unit...), append(now, j.unit...)
	}
	switch {
	case got == nil:
		f.Problem = " is gone"
	case want == nil:
		f.Problem = " is new"
	default:
		f.Problem = " changed"
	}
	subject := "event"
	if d := eventlog.Compare(was, now, nil, nil); len(d) > 0 {
		subject, f.Cause = d[0].Event, d[0].Cause
	}
	f.Problem = printable(subject, maxNote) + f.Problem
	return f
}
