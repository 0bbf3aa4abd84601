package main

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// attempt is one mutated log with its quote.
type attempt struct {
	*dice
	source   *source
	demand   *demand
	how      string
	applied  []string
	evidence attest.Evidence
}

func (a *attempt) String() string {
	return fmt.Sprintf("%s, PCR %v (%s), %s: %s", a.source.name, a.demand.pcrs, a.demand.policy.Bank, a.how, strings.Join(a.applied, ", "))
}

// make mutates a boot. The quote is one of the four that a forger could have:
//
//   - the quote of the unmutated boot: the log lies;
//   - a quote that matches the mutated log: the machine booted that way;
//   - a quote that matches the mutated log after one more mutation: the machine booted in
//     another way, and the log hides it;
//   - the quote of a machine that extended a PCR without logging it.
func (a *attempt) make(s *signer) error {
	a.source = pick(a.dice, a.all)
	a.demand = pick(a.dice, a.source.demands)
	b := a.source.boot()
	a.mutate(b)
	d := a.demand
	firmware, userspace := b.encode()
	signed := a.IntN(signedOf) == 0
	a.evidence = attest.Evidence{FirmwareLog: firmware, UserspaceLog: userspace, Quote: keys.Quote{Bank: d.bank, PCRs: d.quote.PCRs}}
	if a.IntN(2) == 0 {
		a.how = "the log lies"
		if signed {
			a.evidence.Quote = d.quote
		}
		return nil
	}
	booted := read(d.bank, firmware, userspace)
	switch a.IntN(4) {
	case 0, 1:
		a.how = "the machine booted so"
	case 2:
		a.how = "the machine booted otherwise"
		a.mutate(b)
		a.evidence.FirmwareLog, a.evidence.UserspaceLog = b.encode()
	default:
		a.how = "the machine measured more"
		pcr := pick(a.dice, d.pcrs)
		booted.digests[pcr] = append(booted.digests[pcr], bytes.Repeat([]byte{byte(a.IntN(256))}, d.bank.Size()))
	}
	a.evidence.Quote.PCRs = booted.values(d.bank, d.pcrs)
	if !signed {
		return nil
	}
	q, err := s.quote(d.bank, a.evidence.Quote.PCRs)
	if err == nil {
		a.evidence.Quote = *q
	}
	return err
}

// signedOf is the number of attempts per whole quote; the others have only the quote's
// values. A signature takes more time than a log.
const signedOf = 4

func (a *attempt) mutate(b *boot) {
	for range 1 + a.IntN(3) {
		m := pick(a.dice, mutations)
		m.apply(a.dice, b)
		a.applied = append(a.applied, m.name)
	}
}

// oracle judges an accepted log.
func (a *attempt) oracle() error {
	d := a.demand
	if !read(d.bank, a.evidence.FirmwareLog, a.evidence.UserspaceLog).same(d.honest, d.pcrs) {
		return fmt.Errorf("%w: %s: it has other digests than the unmutated log", errFalse, a)
	}
	if !maps.EqualFunc(a.evidence.Quote.PCRs, d.quote.PCRs, bytes.Equal) {
		return fmt.Errorf("%w: %s: other values were quoted than those of the unmutated boot", errFalse, a)
	}
	return nil
}

// errFalse is the error that the command looks for.
var errFalse = errors.New("false acceptance")

// print shows the results, by mutation.
func (t *tally) print() {
	stages := []stage{byParser, byReplay, byOther, byPolicy, accepted}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	row := func(name string, by map[stage]int) {
		n := 0
		for _, c := range by {
			n += c
		}
		fmt.Fprintf(w, "%s\t%d\t", name, n)
		for _, s := range stages {
			fmt.Fprintf(w, "%d\t", by[s])
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w, "mutation\tlogs\tno: parser\tno: replay\tno: go-attestation\tno: boot policy\taccepted\t")
	for _, name := range slices.Sorted(maps.Keys(t.kinds)) {
		row(name, t.kinds[name])
	}
	row("all (most have several)", t.by)
	_ = w.Flush()
}

// check demands that the run was able to find something, and that it stayed within the
// limits.
func (t *tally) check() error {
	for _, s := range []stage{byParser, byReplay, byPolicy, accepted} {
		if t.tried >= 10_000 && t.by[s] == 0 {
			return fmt.Errorf("no log ended at %q: the mutations show nothing", s)
		}
	}
	for _, m := range mutations {
		if t.tried >= 10_000 && len(t.kinds[m.name]) == 0 {
			return fmt.Errorf("no log was mutated by %q", m.name)
		}
	}
	if t.slowest > maxTime {
		return fmt.Errorf("one log took %s, more than %s", t.slowest, maxTime)
	}
	if m := memory(); m > maxMemory {
		return fmt.Errorf("%d MiB of memory were used, more than %d", m>>20, maxMemory>>20)
	}
	return nil
}
