package bootpolicy

import (
	"bytes"
	"crypto"
	"slices"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// Narrow returns a boot policy without the sequences of past boots. It reverses
// [BootPolicy.AlsoAllow] after an update. running is the log of the running boot; others are
// PCR values of further boots that must pass, such as a next boot. p stays as it is.
//
// A sequence stays if the running boot matches it, or if it leads to the PCR value of one of
// the others. It also stays in doubt: if an entry is not a digest, because a person wrote
// it, and if one of the others does not name the PCR. Other rules stay as they are.
//
// Narrow fails if the running boot does not pass.
func (p *BootPolicy) Narrow(running *eventlog.Log, others []eventlog.PCRs) (*BootPolicy, error) {
	claimed, err := p.Claimed(running)
	if err != nil {
		return nil, err
	}
	if err := Judge(p, running, claimed).Err(); err != nil {
		return nil, err
	}
	locality, err := running.StartupLocality()
	if err != nil {
		return nil, err
	}
	narrower := *p
	narrower.PCRs = map[int]Rule{}
	for pcr, rule := range p.PCRs {
		rule.Sequences = slices.Clone(rule.Sequences)
		rule.Sequences = slices.DeleteFunc(rule.Sequences, func(list []Entry) bool {
			alone := *p
			alone.PCRs = map[int]Rule{pcr: {Separator: rule.Separator, Sequences: [][]Entry{list}}}
			alone.SecureBoot, alone.Firmware = "", Firmware{}
			runs := Judge(&alone, running, eventlog.PCRs{pcr: claimed[pcr]}).Accepted
			return !runs && over(list, pcr, p.Hash(), locality, others)
		})
		narrower.PCRs[pcr] = rule
	}
	return &narrower, Judge(&narrower, running, claimed).Err()
}

// over reports whether a sequence certainly belongs to none of the boots.
func over(list []Entry, pcr int, bank crypto.Hash, locality byte, boots []eventlog.PCRs) bool {
	var digests []eventlog.Summary
	for _, e := range list {
		if e.Form != FormDigest {
			return false
		}
		digests = append(digests, eventlog.Summary{PCR: pcr, Digest: e.Value})
	}
	values, err := eventlog.ReplaySummary(digests, bank, locality)
	if err != nil {
		return false
	}
	return !slices.ContainsFunc(boots, func(b eventlog.PCRs) bool {
		value, named := b[pcr]
		return !named || bytes.Equal(value, values[pcr])
	})
}
