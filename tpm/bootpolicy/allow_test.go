package bootpolicy_test

import (
	"crypto"
	"slices"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

func booted(t *testing.T, change func(*simboot.Boot)) *eventlog.Log {
	t.Helper()
	b := simboot.Baseline(simboot.UKI)
	change(&b)
	m := tpmtest.New(t, b)
	log, err := attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}.Read()
	if err != nil {
		t.Fatal(err)
	}
	return log
}

// TestAlsoAllow: afterwards both boots pass, another one does not, and nothing allows
// Secure Boot to be off.
func TestAlsoAllow(t *testing.T) {
	now := booted(t, func(*simboot.Boot) {})
	next := booted(t, func(b *simboot.Boot) { b.Kernel, b.Dbx = "6.13.1", "2026-11-01" })
	other := booted(t, func(b *simboot.Boot) { b.Kernel = "6.14" })
	insecure := booted(t, func(b *simboot.Boot) { b.SecureBoot = false })
	recorded, err := bootpolicy.Record(now, crypto.SHA256, []int{0, 4, 7, 11})
	if err != nil {
		t.Fatal(err)
	}
	listed := *recorded
	listed.PCRs = map[int]bootpolicy.Rule{}
	for pcr, r := range recorded.PCRs { // the same without order
		listed.PCRs[pcr] = bootpolicy.Rule{Separator: r.Separator, Allowed: dedup(r.Sequences[0])}
	}
	for name, p := range map[string]*bootpolicy.BootPolicy{"sequences": recorded, "allowed": &listed} {
		before := string(p.Marshal())
		accepts := func(p *bootpolicy.BootPolicy, log *eventlog.Log) bool {
			claimed, err := p.Claimed(log)
			if err != nil {
				t.Fatal(err)
			}
			return bootpolicy.Judge(p, log, claimed).Accepted
		}
		if !accepts(p, now) || accepts(p, next) {
			t.Fatalf("%s: the boot policy is of no use here", name)
		}
		wider, err := p.AlsoAllow(next)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !accepts(wider, now) || !accepts(wider, next) || accepts(wider, other) || accepts(wider, insecure) {
			t.Errorf("%s: now %t, next %t, other %t, insecure %t", name, accepts(wider, now), accepts(wider, next), accepts(wider, other), accepts(wider, insecure))
		}
		if string(p.Marshal()) != before {
			t.Errorf("%s: the boot policy itself was changed", name)
		}
		again, err := wider.AlsoAllow(next)
		if err != nil || string(again.Marshal()) != string(wider.Marshal()) {
			t.Errorf("%s: allowing it twice changes more: %v", name, err)
		}
		if parsed, err := bootpolicy.Parse(wider.Marshal()); err != nil || !accepts(parsed, next) {
			t.Errorf("%s: written and read: %v", name, err)
		}
		if _, err := p.AlsoAllow(insecure); err == nil {
			t.Errorf("%s: Secure Boot off is allowed", name)
		}
	}
}

func dedup(entries []bootpolicy.Entry) []bootpolicy.Entry {
	var out []bootpolicy.Entry
	for _, e := range entries {
		if !slices.ContainsFunc(out, func(o bootpolicy.Entry) bool { return o.Value == e.Value }) {
			out = append(out, e)
		}
	}
	return out
}
