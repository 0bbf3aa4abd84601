package bootpolicy

import (
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// AlsoAllow returns a boot policy that allows every boot that p allows, and the boot of this
// log: for each PCR that p refuses, it adds the log's list to the rule. The caller vouches for
// the log, such as the predicted log of a next boot. A difference that no list can
// allow, such as another state of Secure Boot, is an error. p stays as it is.
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
		refusal := &RefusedError{v}
		return nil, fmt.Errorf("%w; %s", refusal, refusal.Hint())
	}
	if n := len(wider.Marshal()); n > MaxSize {
		return nil, fmt.Errorf("boot policy: it would have %d bytes, more than %d; run kleidi bootpolicy narrow, which removes the lists of earlier boots", n, MaxSize)
	}
	return &wider, nil
}

// plus returns r with the entries of a recorded rule added.
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
