package main

import (
	"crypto"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

func newCampaign(t *testing.T, change func(c *chain)) *campaign {
	t.Helper()
	s, err := newSigner()
	if err != nil {
		t.Fatal(err)
	}
	all, err := corpus(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	c := &campaign{chain: real, signer: s, all: all}
	change(&c.chain)
	return c
}

// TestMutatedLogs is a short run; "make fuzz" has the long one.
func TestMutatedLogs(t *testing.T) {
	c := newCampaign(t, func(*chain) {})
	if err := c.run(t.Context(), fixedSeed, 0, 10_000); err != nil {
		t.Fatal(err)
	}
	if err := c.check(); err != nil {
		t.Error(err)
	}
	if c.tried != 10_000 || c.by[byOther] == 0 {
		t.Errorf("%d logs, %v", c.tried, c.by)
	}
}

// unquoted replaces the steps before the boot policy. They replay too, so that each
// fault counts in both.
func unquoted(verify func(firmware, userspace []byte, bank crypto.Hash, quoted eventlog.PCRs) (*eventlog.Log, error)) func(*chain) {
	return func(c *chain) {
		c.verifyLogs = verify
		c.verify = func(e *attest.Evidence, _ []byte, bank crypto.Hash, _ []int) (*attest.Result, error) {
			log, err := verify(e.FirmwareLog, e.UserspaceLog, bank, e.Quote.PCRs)
			return &attest.Result{Bank: bank, PCRs: e.Quote.PCRs, Log: log}, err
		}
	}
}

// parsed is the part before the boot policy, without a replay.
func parsed(firmware, userspace []byte, _ crypto.Hash, _ eventlog.PCRs) (*eventlog.Log, error) {
	log, err := eventlog.Parse(firmware)
	if err != nil {
		return nil, err
	}
	events, err := eventlog.ParseUserspace(userspace)
	log.Append(events)
	return log, err
}

// TestTheOracleNotices: with each fault in the chain, the chain accepts a log that the
// oracle finds, within a few thousand logs.
func TestTheOracleNotices(t *testing.T) {
	for name, fault := range map[string]func(*chain){
		"no boot policy": func(c *chain) {
			c.judge = func(*bootpolicy.BootPolicy, *eventlog.Log, eventlog.PCRs) *bootpolicy.Verdict {
				return &bootpolicy.Verdict{Accepted: true}
			}
		},
		"the log is taken at its word": func(c *chain) {
			unquoted(parsed)(c)
			c.judge = func(p *bootpolicy.BootPolicy, log *eventlog.Log, _ eventlog.PCRs) *bootpolicy.Verdict {
				claimed, err := p.Claimed(log)
				if err != nil {
					return &bootpolicy.Verdict{}
				}
				return bootpolicy.Judge(p, log, claimed)
			}
		},
		"PCRs without events pass with any value": func(c *chain) {
			unquoted(parsed)(c)
			c.judge = func(p *bootpolicy.BootPolicy, log *eventlog.Log, quoted eventlog.PCRs) *bootpolicy.Verdict {
				believed := eventlog.PCRs{}
				for pcr, v := range quoted {
					if !slices.ContainsFunc(log.Events, func(e eventlog.Event) bool { return e.PCR == pcr }) {
						v = make([]byte, len(v))
					}
					believed[pcr] = v
				}
				return bootpolicy.Judge(p, log, believed)
			}
		},
		"order and number are not judged": func(c *chain) {
			c.judge = func(p *bootpolicy.BootPolicy, log *eventlog.Log, quoted eventlog.PCRs) *bootpolicy.Verdict {
				loose := *p
				loose.PCRs = map[int]bootpolicy.Rule{}
				for pcr, r := range p.PCRs {
					if len(r.Sequences[0]) > 0 {
						r = bootpolicy.Rule{Separator: r.Separator, Allowed: r.Sequences[0]}
					}
					loose.PCRs[pcr] = r
				}
				return bootpolicy.Judge(&loose, log, quoted)
			}
		},
		"one PCR is not judged": func(c *chain) {
			c.judge = func(p *bootpolicy.BootPolicy, log *eventlog.Log, quoted eventlog.PCRs) *bootpolicy.Verdict {
				loose := *p
				loose.PCRs = map[int]bootpolicy.Rule{}
				for pcr, r := range p.PCRs {
					if pcr == 11 {
						r = bootpolicy.Rule{Any: true}
					}
					loose.PCRs[pcr] = r
				}
				return bootpolicy.Judge(&loose, log, quoted)
			}
		},
	} {
		c := newCampaign(t, fault)
		err := c.run(t.Context(), fixedSeed, 0, 20_000)
		if !errors.Is(err, errFalse) || !strings.Contains(err.Error(), "repeat it with -seed") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestFailuresAreReported: a panic, and a refused quote, end the run.
func TestFailuresAreReported(t *testing.T) {
	for want, fault := range map[string]func(*chain){
		"panic: of the parser": unquoted(func([]byte, []byte, crypto.Hash, eventlog.PCRs) (*eventlog.Log, error) {
			panic("of the parser")
		}),
		"the quote was refused": unquoted(func([]byte, []byte, crypto.Hash, eventlog.PCRs) (*eventlog.Log, error) {
			return nil, errors.New("quote: of another key")
		}),
	} {
		c := newCampaign(t, fault)
		if err := c.run(t.Context(), fixedSeed, 0, 100); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "-from") {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// TestAnAttemptCanBeRepeated: the number and the seed decide everything but the
// signature.
func TestAnAttemptCanBeRepeated(t *testing.T) {
	c := newCampaign(t, func(*chain) {})
	for i := range uint64(200) {
		var made [2]*attempt
		for k := range made {
			made[k] = c.attempt(7, i)
			if err := made[k].make(c.signer); err != nil {
				t.Fatal(err)
			}
		}
		a, b := made[0], made[1]
		if a.String() != b.String() || !slices.Equal(a.evidence.FirmwareLog, b.evidence.FirmwareLog) || !slices.Equal(a.evidence.UserspaceLog, b.evidence.UserspaceLog) {
			t.Fatalf("%s\n%s", a, b)
		}
	}
}
