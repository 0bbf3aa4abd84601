package serve

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

// openNode returns a machine whose open keyring has two slots of one type and node, a slot
// that a rotation skipped, and no slot of the token that unlock.order names.
func openNode(t *testing.T) *node.Node {
	t.Helper()
	n := nodetest.New(t, nodetest.Opens(seal.TypePKCS11))
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	skipped, err := slotview.Skip(seal.Slot{Type: seal.TypeVault, Data: []byte("{}")})
	if err != nil {
		t.Fatal(err)
	}
	slots := []seal.Slot{{Type: seal.TypeRecovery, Data: []byte(`{"a":1}`)}, {Type: seal.TypeRecovery, Data: []byte(`{"a":2}`)}, skipped}
	k, err := keyring.New(seal.ClusterID{1}, kek, slots, []keyring.Node{{Name: "cp-1"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	nodetest.Hold(t, n, k)
	return n
}

// TestReady: serve is ready if its socket listens and the keyring is open. Until then the
// answer names which of the two is missing, the socket first.
func TestReady(t *testing.T) {
	for name, row := range map[string]struct {
		n    *node.Node
		kms  error
		says string
	}{
		"no socket":         {openNode(t), errors.New("in use"), "KMS socket: in use"},
		"locked":            {nodetest.New(t, nodetest.Opens(seal.TypePKCS11)), nil, "locked: starting: "},
		"locked, no socket": {nodetest.New(t, nodetest.Opens(seal.TypePKCS11)), errors.New("in use"), "KMS socket: in use"},
		"ready":             {openNode(t), nil, ""},
	} {
		h := newHealth(prometheus.NewRegistry())
		h.bind(row.n)
		if err := h.ready(); err == nil || !strings.Contains(err.Error(), "KMS socket: the KMS socket does not listen yet") {
			t.Errorf("%s, before the socket listens: %v", name, err)
		}
		h.setKMS(row.kms)
		err := h.ready()
		if row.says == "" && err != nil || row.says != "" && (err == nil || !strings.HasPrefix(err.Error(), row.says)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRemarks: a missing way into the keyring is a remark, and does not make serve unready.
func TestRemarks(t *testing.T) {
	h := newHealth(prometheus.NewRegistry())
	h.bind(openNode(t))
	h.setKMS(nil)
	remarks := strings.Join(h.remarks(), "\n")
	for _, slot := range []string{"vault", "pkcs11"} {
		if !strings.Contains(remarks, "self-test: slot "+slot+" does not open: ") {
			t.Errorf("%s is not missed: %s", slot, remarks)
		}
	}
	if err := h.ready(); err != nil {
		t.Errorf("%v", err)
	}
	h.bind(nodetest.New(t, nodetest.Opens(seal.TypePKCS11)))
	if got := h.remarks(); got != nil {
		t.Errorf("a locked node remarks %q", got)
	}
}

// values gathers the metrics of a node, without those of Go and the process.
func values(t *testing.T, h *health) map[string]float64 {
	t.Helper()
	families, err := h.registry.Gather() // fails on a duplicate series
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			name := f.GetName()
			for _, l := range m.Label {
				if l.GetName() != "key_id_hash" {
					name += " " + l.GetValue()
				}
			}
			all[name] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return all
}

// TestCollect: a locked node reports no keyring, rather than an empty one. Two slots of one
// type don't fail the scrape.
func TestCollect(t *testing.T) {
	h := newHealth(prometheus.NewRegistry())
	h.bind(nodetest.New(t, nodetest.Opens(seal.TypePKCS11)))
	locked := values(t, h)
	if open, ok := locked["kleidi_open"]; !ok || open != 0 || locked["kleidi_problem"] != 1 {
		t.Errorf("locked: %v", locked)
	}
	for _, name := range []string{"kleidi_keyring_revision", "kleidi_keks current", "kleidi_nodes", "kleidi_self_test_failed_slots"} {
		if v, ok := locked[name]; ok {
			t.Errorf("a locked node reports %s %v", name, v)
		}
	}
	h.bind(openNode(t))
	open := values(t, h)
	for name, want := range map[string]float64{"kleidi_open": 1, "kleidi_problem": 0, "kleidi_keyring_revision": 1, "kleidi_keks current": 1, "kleidi_keks retired": 0,
		"kleidi_nodes": 1, "kleidi_self_test_failed_slots": 2, "kleidi_suspended": 0, "kleidi_attestation_passed": 0, "kleidi_current_key_id_info": 1} {
		if got, ok := open[name]; !ok || got != want {
			t.Errorf("%s is %v (%v), want %v", name, got, ok, want)
		}
	}
}

// TestAttempted: every cause has a series from the start, and an attempt counts under its
// own cause alone.
func TestAttempted(t *testing.T) {
	h := newHealth(prometheus.NewRegistry())
	h.attempted("", unlock.Timing{})
	h.attempted(seal.CauseBootState, unlock.Timing{})
	h.attempted(seal.CauseBootState, unlock.Timing{})
	got := values(t, h)
	want := map[seal.Cause]float64{seal.CauseBootState: 2}
	for _, c := range seal.Causes() {
		if v, ok := got["kleidi_unlock_attempts_total "+string(c)]; !ok || v != want[c] {
			t.Errorf("%s: %v (%v)", c, v, ok)
		}
	}
	if got["kleidi_unlock_attempts_total none"] != 1 {
		t.Errorf("%v", got)
	}
}

// TestPause: a wait ends early with its context, and says so.
func TestPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		if !pause(t.Context(), time.Hour) || time.Since(start) != time.Hour {
			t.Errorf("after %v", time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		start = time.Now()
		if pause(ctx, time.Hour) || time.Since(start) != time.Minute {
			t.Errorf("after %v", time.Since(start))
		}
	})
}

// TestKeysOf: only a node that shares its keyring looks into the cluster store before it
// announces a key ID.
func TestKeysOf(t *testing.T) {
	n := nodetest.New(t, nodetest.Opens(seal.TypePKCS11))
	if got := keysOf(n); got != n.Unlocker {
		t.Errorf("%T", got)
	}
}

// TestOrDefault: 0 is a user, not a missing setting.
func TestOrDefault(t *testing.T) {
	for id, want := range map[int]int{-1: 7, 0: 0, 5: 5} {
		if got := orDefault(id, 7); got != want {
			t.Errorf("%d: %d, want %d", id, got, want)
		}
	}
}
