package rollout

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

// TestStoreUp: a store that was never read, or does not answer now, is not up. Any other
// problem is a problem with the store's content.
func TestStoreUp(t *testing.T) {
	now := time.Now()
	fork, away := seal.Errorf(seal.CauseForked, "", "a fork"), seal.Errorf(seal.CauseUnavailable, "", "away")
	for name, row := range map[string]struct {
		state        replica.State
		up, forked   bool
		notInStepFor string
	}{
		"never read":       {replica.State{}, false, false, "has not read the cluster store yet"},
		"read":             {replica.State{Reached: now}, true, false, "has not read the cluster store yet"},
		"away":             {replica.State{Reached: now, Away: true, Problem: away}, false, false, "away"},
		"away from before": {replica.State{Away: true, Problem: away}, false, false, "away"},
		"a wrapper is":     {replica.State{Reached: now, Problem: away}, true, false, "away"},
		"forked":           {replica.State{Reached: now, Problem: fork}, true, true, "a fork"},
		"of another kind":  {replica.State{Reached: now, Problem: errors.New("damaged")}, true, false, "damaged"},
	} {
		if StoreUp(row.state) != row.up || Forked(row.state) != row.forked {
			t.Errorf("%s: up %v, forked %v", name, StoreUp(row.state), Forked(row.state))
		}
		if err := notInStep(row.state); err == nil || !strings.Contains(err.Error(), row.notInStepFor) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestBehind: a node that does not take the store's keyring can't judge the others.
func TestBehind(t *testing.T) {
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	k, err := keyring.New(seal.ClusterID{1}, kek, []seal.Slot{{Type: seal.TypeRecovery, Data: []byte("{}")}}, []keyring.Node{{Name: "cp-1"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	for cause, behind := range map[seal.Cause]int{"": 1, seal.CauseUnavailable: 1, seal.CauseAnchor: 0, seal.CauseForked: 0, seal.CauseNodeRemoved: 0} {
		s := replica.State{Reports: []replica.Report{{Node: "cp-1"}}}
		if cause != "" {
			s.Problem = seal.Errorf(cause, "", "a problem")
		}
		if got := report(s, k).Behind; len(got) != behind {
			t.Errorf("%q: %+v", cause, got)
		}
	}
}

// TestWaiting: each missing node comes with its record, even a record from before the
// present keyring.
func TestWaiting(t *testing.T) {
	record := &keyring.VerifiedRecord{}
	record.Revision, record.Version, record.Problem = 7, "v1", "the TPM is locked out"
	missing := []rotation.Missing{{Node: "cp-1", Why: rotation.WhyNoRecord}, {Node: "cp-2", Why: rotation.WhyNoRecord}, {Node: "cp-3", Why: rotation.WhyNotAcknowledged}}
	reports := []replica.Report{{Node: "cp-1"}, {Node: "cp-2", Record: record}, {Node: "cp-3", Record: record}, {Node: "cp-4", Record: record}}
	all := waiting(missing, reports, rotation.WhyNotFollowed)
	if len(all) != 3 {
		t.Fatalf("%+v", all)
	}
	for i, why := range []rotation.Why{rotation.WhyNoRecord, rotation.WhyNotFollowed, rotation.WhyNotAcknowledged} {
		if all[i].Node != missing[i].Node || all[i].Why != string(why) {
			t.Errorf("%+v, want %q", all[i], why)
		}
	}
	if all[0].Revision != 0 || all[1].Revision != 7 || all[2].Version != "v1" || all[2].Problem != "the TPM is locked out" {
		t.Errorf("%+v", all)
	}
}

// TestOfThisLife: a node that was removed and has joined again is not shown with what it said
// before, unless that record counts.
func TestOfThisLife(t *testing.T) {
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	joined := time.Now()
	first, err := keyring.New(seal.ClusterID{1}, kek, []seal.Slot{{Type: seal.TypeRecovery, Data: []byte("{}")}}, []keyring.Node{{Name: "cp-1"}}, joined)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	k, err := first.Upgrade(keyring.Node{Name: "cp-1", Added: joined})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	for name, row := range map[string]struct {
		started time.Duration
		counts  bool
		said    bool
	}{
		"before it joined again": {-time.Hour, false, false}, "before, but it counts": {-time.Hour, true, true}, "since it joined": {time.Hour, false, true},
	} {
		record := &keyring.VerifiedRecord{}
		record.Revision, record.Problem, record.Started = 7, "run kleidi reset", joined.Add(row.started)
		s := replica.State{Reports: []replica.Report{{Node: "cp-1", Record: record, Counts: row.counts}}}
		r := report(s, k)
		for _, w := range append(r.Behind, r.Rotation.Waiting...) {
			if (w.Problem != "") != row.said || w.Revision != 7 {
				t.Errorf("%s: %+v", name, w)
			}
		}
		if len(r.Behind) != 1 || len(r.Rotation.Waiting) != 1 || record.Problem == "" {
			t.Errorf("%s: %+v", name, r)
		}
	}
}
