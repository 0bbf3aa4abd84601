package bootpolicy_test

import (
	"crypto"
	"maps"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// TestNarrow: after an update, the earlier boot no longer passes; the running boot and
// a further next boot do.
func TestNarrow(t *testing.T) {
	old := booted(t, func(*simboot.Boot) {})
	now := booted(t, func(b *simboot.Boot) { b.Kernel, b.Dbx = "6.13.1", "2026-11-01" })
	next := booted(t, func(b *simboot.Boot) { b.Kernel, b.Dbx = "6.14", "2026-11-01" })
	firmware := booted(t, func(b *simboot.Boot) { b.Firmware = "edk2 2026.02" })
	pcrs := []int{0, 4, 7, 11}
	recorded, err := bootpolicy.Record(old, crypto.SHA256, pcrs)
	if err != nil {
		t.Fatal(err)
	}
	recorded.Firmware.Versions = nil // or other firmware could not be allowed
	wide := recorded
	for _, log := range []*eventlog.Log{now, next, firmware} {
		if wide, err = wide.AlsoAllow(log); err != nil {
			t.Fatal(err)
		}
	}
	values := func(log *eventlog.Log, of ...int) eventlog.PCRs {
		all, err := log.Replay(crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		some := eventlog.PCRs{}
		for _, i := range of {
			some[i] = all[i]
		}
		return some
	}
	written := *wide // its list of PCR 11 for the old boot is a person's
	written.PCRs = maps.Clone(wide.PCRs)
	lists := append([][]bootpolicy.Entry(nil), wide.PCRs[11].Sequences...)
	lists[0] = append([]bootpolicy.Entry{{Form: bootpolicy.FormText, Value: ".linux"}}, lists[0][1:]...)
	written.PCRs[11] = bootpolicy.Rule{Sequences: lists}

	certificate := *wide // its list of PCR 7 for the old boot has a certificate
	certificate.PCRs = maps.Clone(wide.PCRs)
	signed := append([][]bootpolicy.Entry(nil), wide.PCRs[7].Sequences...)
	signed[0] = append([]bootpolicy.Entry{{Form: bootpolicy.FormCertificate, Value: signed[0][0].Value}}, signed[0][1:]...)
	certificate.PCRs[7] = bootpolicy.Rule{Sequences: signed}

	for name, c := range map[string]struct {
		policy *bootpolicy.BootPolicy
		others []eventlog.PCRs
		lists  map[int]int // how many of a PCR stay
		pass   []*eventlog.Log
		fail   []*eventlog.Log
	}{
		"the running boot alone": {wide, nil, map[int]int{0: 1, 4: 1, 7: 1, 11: 1}, []*eventlog.Log{now}, []*eventlog.Log{old, next, firmware}},
		"and a next one":         {wide, []eventlog.PCRs{values(next, 4, 7, 11)}, map[int]int{0: 2, 4: 2, 7: 1, 11: 2}, []*eventlog.Log{now, next}, []*eventlog.Log{old, firmware}},
		"and one of all PCRs":    {wide, []eventlog.PCRs{values(next, pcrs...)}, map[int]int{0: 1, 4: 2, 7: 1, 11: 2}, []*eventlog.Log{now, next}, []*eventlog.Log{old, firmware}},
		"a certificate":          {&certificate, nil, map[int]int{0: 1, 4: 1, 7: 2, 11: 1}, []*eventlog.Log{now}, []*eventlog.Log{old, next}},
		"a list of a person":     {&written, nil, map[int]int{0: 1, 4: 1, 7: 1, 11: 2}, []*eventlog.Log{now}, []*eventlog.Log{old, next}},
	} {
		before := string(c.policy.Marshal())
		narrow, err := c.policy.Narrow(now, c.others)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for pcr, want := range c.lists {
			if got := len(narrow.PCRs[pcr].Sequences); got != want {
				t.Errorf("%s: PCR %d has %d lists, want %d", name, pcr, got, want)
			}
		}
		for want, logs := range map[bool][]*eventlog.Log{true: c.pass, false: c.fail} {
			for i, log := range logs {
				claimed, err := narrow.Claimed(log)
				if err != nil {
					t.Fatal(err)
				}
				if v := bootpolicy.Judge(narrow, log, claimed); v.Accepted != want {
					t.Errorf("%s: boot %d passes: %t, want %t: %v", name, i, v.Accepted, want, v.Err())
				}
			}
		}
		if string(c.policy.Marshal()) != before {
			t.Errorf("%s: the boot policy itself was changed", name)
		}
		if again, err := narrow.Narrow(now, c.others); err != nil || string(again.Marshal()) != string(narrow.Marshal()) {
			t.Errorf("%s: narrowing it twice changes more: %v", name, err)
		}
	}
	if _, err := recorded.Narrow(now, nil); err == nil {
		t.Error("a boot policy that refuses the running boot was narrowed to it")
	}
	unordered := *wide
	unordered.Firmware = bootpolicy.Firmware{}
	unordered.PCRs = map[int]bootpolicy.Rule{4: {Any: true}, 7: {Allowed: dedup(append(wide.PCRs[7].Sequences[0], wide.PCRs[7].Sequences[1]...))}}
	if narrow, err := unordered.Narrow(now, nil); err != nil || string(narrow.Marshal()) != string(unordered.Marshal()) {
		t.Errorf("rules without sequences were changed: %v", err)
	}
}
