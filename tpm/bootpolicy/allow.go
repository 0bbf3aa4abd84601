package bootpolicy

import (
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// AlsoAllow returns a boot policy that allows what p allows, and the boot of this
// log: the lists of the PCRs that p does not know are added to its own. It is for
// a log that somebody vouches for, such as the predicted one of a next boot. What
// no list can allow, another state of Secure Boot for instance, is an error. p
// stays as it is.
func (p *BootPolicy) AlsoAllow(log *eventlog.Log) (*BootPolicy, error) {
	claimed, err := p.Claimed(log)
	if err != nil {
		return nil, fmt.Errorf("boot policy: %w", err)
	}
	j := &judgement{Verdict: &Verdict{}, policy: p, events: map[int][]event{}}
	j.collect(log)
	wider := *p
	wider.PCRs = map[int]Rule{}
	for _, pcr := range p.Demanded() {
		alone := *p
		alone.PCRs, alone.SecureBoot, alone.Firmware = map[int]Rule{pcr: p.PCRs[pcr]}, "", Firmware{}
		rule := p.PCRs[pcr]
		if !Judge(&alone, log, eventlog.PCRs{pcr: claimed[pcr]}).Accepted {
			rule = rule.plus(recordRule(pcr, j.events[pcr]))
		}
		wider.PCRs[pcr] = rule
	}
	if v := Judge(&wider, log, claimed); !v.Accepted {
		return nil, v.Err()
	}
	if n := len(wider.Marshal()); n > MaxSize {
		return nil, fmt.Errorf("boot policy: it would have %d bytes, more than %d; run kleidi bootpolicy narrow, which takes those of earlier boots out", n, MaxSize)
	}
	return &wider, nil
}

// plus returns r with what a recorded rule lists.
func (r Rule) plus(recorded Rule) Rule {
	if r.Sequences != nil {
		r.Sequences = append(slices.Clone(r.Sequences), recorded.Sequences...)
		return r
	}
	r.Allowed = slices.Clone(r.Allowed)
	for _, e := range recorded.Sequences[0] {
		if !slices.ContainsFunc(r.Allowed, func(a Entry) bool { return a.Form == e.Form && a.Value == e.Value }) {
			r.Allowed = append(r.Allowed, e)
		}
	}
	return r
}
