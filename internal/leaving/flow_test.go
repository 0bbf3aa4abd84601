package leaving

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

// TestDrop: the nodes leave in one revision. A staged KEK, which they may know, is retired
// before, so that it can never become current.
func TestDrop(t *testing.T) {
	whole := threeNodes(t)
	staged, err := whole.Stage(newKEK(t), recoverySlots, time.Now())
	must(t, staged, err)
	for name, row := range map[string]struct {
		k       *keyring.Keyring
		changes int
		retired int
	}{"no rotation": {whole, 1, 0}, "during a rotation": {staged, 2, 1}} {
		n := nodetest.Holding(t, "cp-1", row.k)
		changes, err := drop(t.Context(), n, []string{"cp-2", "cp-3"})
		if err != nil || len(changes) != row.changes || !strings.HasPrefix(changes[len(changes)-1], "nodes cp-2, cp-3 are no longer in the keyring") {
			t.Errorf("%s: %q, %v", name, changes, err)
		}
		k, err := n.Unlocker.Keyring()
		if err != nil {
			t.Fatal(err)
		}
		i := k.Info()
		if len(i.Nodes) != 1 || i.Staged != nil || len(i.Retired) != row.retired || !slices.Equal(i.Former, []string{"cp-2", "cp-3"}) || k.CurrentID() != whole.CurrentID() {
			t.Errorf("%s: %+v", name, i)
		}
	}
}

// TestRemove: what a removal refuses, without a change.
func TestRemove(t *testing.T) {
	k := threeNodes(t)
	n := nodetest.Holding(t, "cp-1", k)
	s := Serve{
		Audit:    func(...Record) error { t.Error("the audit log records a refusal"); return nil },
		Approved: func() []string { return []string{"cp-8"} },
		Forget:   func(name string) { t.Errorf("the approval of %s is withdrawn", name) },
	}
	for name, row := range map[string]struct {
		nodes []string
		says  string
	}{
		"itself":       {[]string{"cp-1"}, "remove: node cp-1 is this one"},
		"not enough":   {[]string{"cp-3"}, "remove: 2 nodes would remain, which share no cluster store"},
		"unknown node": {[]string{"cp-9"}, "remove: node cp-9 is not in the keyring, and no removed node of that name knows its current KEK; the nodes are cp-1, cp-2, cp-3"},
		"misspelt":     {[]string{"cp-2", "cp-3", "cp-8", "cp-9"}, "remove: node cp-9 is not in the keyring"},
	} {
		if _, err := Remove(t.Context(), n, s, admin.RemoveNodesRequest{Nodes: row.nodes}); err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v", name, err)
		}
		if now, err := n.Unlocker.Keyring(); err != nil || now.Revision() != k.Revision() {
			t.Errorf("%s: the keyring was changed", name)
		}
	}
}

// TestWithdraw: a name that was only approved loses its approval, and the keyring stays as it is.
func TestWithdraw(t *testing.T) {
	k := threeNodes(t)
	n := nodetest.Holding(t, "cp-1", k)
	var forgotten []string
	s := Serve{
		Audit:    func(...Record) error { t.Error("the audit log records a removal"); return nil },
		Approved: func() []string { return []string{"cp-8"} },
		Forget:   func(name string) { forgotten = append(forgotten, name) },
	}
	r, err := Remove(t.Context(), n, s, admin.RemoveNodesRequest{Nodes: []string{"cp-8"}})
	if err != nil || r.Phase != admin.RemovalDone || r.Nodes == nil || len(r.Nodes) > 0 || !slices.Equal(r.Changes, []string{"the approval of node cp-8 is withdrawn"}) || r.CurrentKeyID != k.CurrentID() {
		t.Errorf("%+v, %v", r, err)
	}
	if now, err := n.Unlocker.Keyring(); err != nil || now.Revision() != k.Revision() || !slices.Equal(forgotten, []string{"cp-8"}) {
		t.Errorf("%q are forgotten, %v", forgotten, err)
	}
}

// TestInterrupted: if no fresh KEK can be made, the nodes have left the keyring all the same,
// and the refusal names the command that goes on. The audit log has the first step alone.
// Without an audit log the removal goes as far.
func TestInterrupted(t *testing.T) {
	k := threeNodes(t)
	for name, auditFails := range map[string]error{"recorded": nil, "not recorded": errors.New("disk full")} {
		n := nodetest.Holding(t, "cp-1", k)
		var steps []string
		audit := func(all ...Record) error {
			for _, r := range all {
				steps = append(steps, r.Removal.Step+" "+r.Node)
			}
			return auditFails
		}
		s := Serve{Audit: audit, Approved: func() []string { return nil }, Forget: func(string) {}}
		r, err := Remove(t.Context(), n, s, admin.RemoveNodesRequest{Nodes: []string{"cp-2", "cp-3"}})
		if err == nil || !strings.Contains(err.Error(), "remove: rotate: ") || !strings.HasSuffix(err.Error(), "run kleidi node remove cp-2 --also cp-3 again") {
			t.Errorf("%s: %v", name, err)
		}
		if !slices.Equal(steps, []string{"dropped cp-2", "dropped cp-3"}) {
			t.Errorf("%s: %q", name, steps)
		}
		if got := slices.ContainsFunc(r.Changes, func(c string) bool { return strings.HasPrefix(c, "THE AUDIT LOG DOES NOT RECORD THIS") }); got != (auditFails != nil) {
			t.Errorf("%s: %q", name, r.Changes)
		}
		now, err := n.Unlocker.Keyring()
		if err != nil || len(now.Nodes()) != 1 || !slices.Equal(now.Info().Former, []string{"cp-2", "cp-3"}) || now.CurrentID() != k.CurrentID() {
			t.Errorf("%s: %+v, %v", name, now.Info(), err)
		}
	}
}

// TestRecords: a line of the audit log has the EK that was listed, and the keyring at that
// moment.
func TestRecords(t *testing.T) {
	k := threeNodes(t)
	all := records(StepDropped, k, []string{"cp-2", "cp-9"}, []keyring.Node{{Name: "cp-1", EK: "sha256:1"}, {Name: "cp-2", EK: "sha256:2"}})
	if len(all) != 2 || all[0].Node != "cp-2" || all[0].EK != "sha256:2" || all[1].Node != "cp-9" || all[1].EK != "" {
		t.Fatalf("%+v", all)
	}
	for _, r := range all {
		if r.Removal != (Step{StepDropped, k.CurrentID(), k.Revision()}) || r.Time.IsZero() {
			t.Errorf("%+v", r)
		}
	}
}

// TestWaysIn: every slot that opens something is a way into the keyring; records of kept
// copies are not. Another node's unusual boot states are named.
func TestWaysIn(t *testing.T) {
	whole := threeNodes(t)
	k, err := whole.WithSlots(append(slices.Clone(recoverySlots), seal.Slot{Type: seal.TypeVault, Data: []byte("{}")}, seal.Slot{Type: seal.TypeUnrevoked, Data: []byte("{}")}))
	must(t, k, err)
	record := &keyring.VerifiedRecord{}
	record.Node, record.BootStates = "cp-2", []keyring.RecordedState{{Use: "present"}, {Use: "suspension"}}
	own := &keyring.VerifiedRecord{}
	own.Node, own.BootStates = "cp-1", record.BootStates
	ways := waysIn(nodetest.Holding(t, "cp-1", whole), k, []*keyring.VerifiedRecord{own, record})
	want := []string{"node cp-1: no TPM", "node cp-2: no TPM, 2 boot states (also: suspension)", "node cp-3: no TPM", "slot recovery: ", "slot vault: "}
	if len(ways) != len(want) {
		t.Fatalf("%q", ways)
	}
	for i, way := range ways {
		if way != want[i] && (!strings.HasSuffix(want[i], ": ") || !strings.HasPrefix(way, want[i])) {
			t.Errorf("%q, want %q", way, want[i])
		}
	}
}

// TestDescribe: before a reset, the operator reads which other nodes keep the keyring, or
// that none does.
func TestDescribe(t *testing.T) {
	for name, row := range map[string]struct {
		k    *keyring.Keyring
		says string
	}{
		"of three nodes": {threeNodes(t), "these nodes keep it: cp-2, cp-3"},
		"the last one": {func() *keyring.Keyring {
			k, err := threeNodes(t).WithoutNode("cp-2", "cp-3")
			return must(t, k, err)
		}(), "no other node has it: Secrets in etcd can be read afterwards only with a backup"},
	} {
		f, err := ToForget(t.Context(), nodetest.Holding(t, "cp-1", row.k))
		if err != nil {
			t.Fatal(err)
		}
		n := &node.Node{Config: &config.Config{Node: "cp-1"}}
		if lines := strings.Join(f.Describe(n), "\n"); f.Nothing() || !strings.Contains(lines, row.says) || !strings.Contains(lines, "node cp-1 forgets the keyring of cluster "+row.k.ClusterID().String()) {
			t.Errorf("%s: %s", name, lines)
		}
	}
}

// TestApprovedMeanwhile: a command that watches a removal leaves an approval alone that came
// after its first request, for the machine that takes the node's place.
func TestApprovedMeanwhile(t *testing.T) {
	n := nodetest.Holding(t, "cp-1", threeNodes(t))
	s := Serve{
		Audit:    func(...Record) error { return nil },
		Approved: func() []string { return []string{"cp-8"} },
		Forget:   func(name string) { t.Errorf("the approval of %s is withdrawn", name) },
	}
	r, _ := Remove(t.Context(), n, s, admin.RemoveNodesRequest{Nodes: []string{"cp-8"}, Begun: true})
	if slices.ContainsFunc(r.Changes, func(c string) bool { return strings.Contains(c, "withdrawn") }) {
		t.Errorf("%q", r.Changes)
	}
}

// TestReplacedMeanwhile: a command that watches a removal leaves the machine alone that has
// joined in the node's place.
func TestReplacedMeanwhile(t *testing.T) {
	k := threeNodes(t)
	n := nodetest.Holding(t, "cp-1", k)
	s := Serve{Audit: func(...Record) error { return nil }, Approved: func() []string { return nil }, Forget: func(string) {}}
	r, err := Remove(t.Context(), n, s, admin.RemoveNodesRequest{Nodes: []string{"cp-2"}, Begun: true})
	if err != nil || len(r.Changes) > 0 || r.Phase != admin.RemovalDone || r.Revision != k.Revision() {
		t.Errorf("%+v, %v", r, err)
	}
	if now, err := n.Unlocker.Keyring(); err != nil || len(now.Nodes()) != 3 {
		t.Errorf("%+v, %v", now.Nodes(), err)
	}
}

// TestRemoveWhileLocked: a removal that must wait ends the approval at once, and says so. A
// command that watches a removal leaves the approval alone.
func TestRemoveWhileLocked(t *testing.T) {
	n := nodetest.Holding(t, "cp-1", threeNodes(t))
	unlock.Lock(n.Unlocker, errors.New("no store"))
	for name, row := range map[string]struct {
		approved  []string
		begun     bool
		forgotten []string
		says      string
	}{
		"not approved": {nil, false, []string{"cp-3", "cp-8"}, "remove: no store"},
		"approved":     {[]string{"cp-8"}, false, []string{"cp-3", "cp-8"}, "remove: the approval of node cp-8 is withdrawn, and nothing else was done: no store"},
		"watched":      {[]string{"cp-8"}, true, nil, "remove: no store; the removal is not complete: once the cause is removed, run kleidi node remove cp-3 --also cp-8 again"},
	} {
		var forgotten []string
		s := Serve{Approved: func() []string { return row.approved }, Forget: func(name string) { forgotten = append(forgotten, name) }}
		_, err := Remove(t.Context(), n, s, admin.RemoveNodesRequest{Nodes: []string{"cp-3", "cp-8"}, Begun: row.begun})
		if err == nil || !strings.HasPrefix(err.Error(), row.says) || !slices.Equal(forgotten, row.forgotten) {
			t.Errorf("%s: %q, %v", name, forgotten, err)
		}
	}
}
