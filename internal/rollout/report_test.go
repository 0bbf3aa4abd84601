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
// problem is one with its content.
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
		"away":             {replica.State{Reached: now, Problem: away}, false, false, "away"},
		"away from before": {replica.State{Problem: away}, false, false, "away"},
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

// TestWaiting: what a rotation waits for on a node comes with what the node's record says,
// even a record from before the present keyring.
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
