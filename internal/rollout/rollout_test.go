package rollout

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
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
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/replica/storetest"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/tpm"
)

var recoverySlots = []seal.Slot{{Type: seal.TypeRecovery, Data: []byte("{}")}}

func must(t *testing.T, k *keyring.Keyring, err error) *keyring.Keyring {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func newKEK(t *testing.T) *seal.Secret {
	t.Helper()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	return kek
}

// alone returns the keyring of cp-1.
func alone(t *testing.T) *keyring.Keyring {
	t.Helper()
	k, err := keyring.New(seal.ClusterID{1}, newKEK(t), recoverySlots, []keyring.Node{{Name: "cp-1"}}, time.Now())
	must(t, k, err)
	k, err = k.Upgrade(keyring.Node{Name: "cp-1"})
	return must(t, k, err)
}

// pair returns the keyring of cp-1 and cp-2, as cp-1 holds it.
func pair(t *testing.T) *keyring.Keyring {
	t.Helper()
	k, err := alone(t).WithNode(keyring.Node{Name: "cp-2"}, time.Now())
	return must(t, k, err)
}

// holding returns a machine without a TPM that holds k open as its own. It reads and writes
// the cluster store s, if there is one.
func holding(t *testing.T, name string, k *keyring.Keyring, s replica.Store) *node.Node {
	t.Helper()
	if s == nil {
		return nodetest.Holding(t, name, k)
	}
	n := nodetest.New(t, nodetest.Named(name), nodetest.Opens(seal.TypePKCS11), func(c *config.Config) {
		c.Cluster.Kubeconfig = filepath.Join(c.State.Dir, "unused")
	})
	noSlots := func(context.Context, *keyring.Keyring, *seal.Secret) ([]seal.Slot, error) { return nil, nil }
	n.Replica = replica.New(replica.Config{Store: s, Unlocker: n.Unlocker, Wrap: noSlots, Log: slog.New(slog.DiscardHandler)})
	nodetest.Hold(t, n, k)
	return n
}

// recorded returns the report of a node whose record is of k, and whose KEK is the given one.
func recorded(k *keyring.Keyring, name string, id seal.KeyID) replica.Report {
	r := &keyring.VerifiedRecord{KeyID: k.CurrentID()}
	r.Node, r.Revision, r.Formats, r.Anchored, r.Announced, r.Encrypted = name, k.Revision(), []int{k.Format()}, id, id, id
	return replica.Report{Node: name, Record: r, Counts: true}
}

// TestDescribe: the phase of a rotation, and for whom it waits. Only a record from after the
// present keyring takes a node off the list.
func TestDescribe(t *testing.T) {
	k := pair(t)
	staged, err := k.Stage(newKEK(t), recoverySlots, time.Now())
	must(t, staged, err)
	acknowledged := func(name string) replica.Report {
		r := recorded(staged, name, staged.CurrentID())
		r.Record.Acknowledged, r.Record.Proven = staged.StagedID(), true
		return r
	}
	unproven, early := acknowledged("cp-2"), acknowledged("cp-2")
	unproven.Record.Proven, early.Counts = false, false
	for name, row := range map[string]struct {
		k       *keyring.Keyring
		reports []replica.Report
		phase   admin.RotationPhase
		why     map[string]rotation.Why
	}{
		"no rotation":          {k, []replica.Report{recorded(k, "cp-1", k.CurrentID()), recorded(k, "cp-2", k.CurrentID())}, admin.RotationDone, nil},
		"another KEK":          {k, []replica.Report{recorded(k, "cp-1", k.CurrentID()), recorded(k, "cp-2", "k1-old")}, admin.RotationSettling, map[string]rotation.Why{"cp-2": rotation.WhyNotAnchored}},
		"no records":           {k, nil, admin.RotationSettling, map[string]rotation.Why{"cp-1": rotation.WhyNoRecord, "cp-2": rotation.WhyNoRecord}},
		"staged, acknowledged": {staged, []replica.Report{acknowledged("cp-1"), acknowledged("cp-2")}, admin.RotationStaged, nil},
		"staged, one missing":  {staged, []replica.Report{acknowledged("cp-1")}, admin.RotationStaged, map[string]rotation.Why{"cp-2": rotation.WhyNoRecord}},
		"staged, unproven":     {staged, []replica.Report{acknowledged("cp-1"), unproven}, admin.RotationStaged, map[string]rotation.Why{"cp-2": rotation.WhyNotAcknowledged}},
		"staged, from before":  {staged, []replica.Report{acknowledged("cp-1"), early}, admin.RotationStaged, map[string]rotation.Why{"cp-2": rotation.WhyNotAcknowledged}},
	} {
		r := describe(row.k, row.reports)
		if r.Phase != row.phase || r.StagedKeyID != row.k.StagedID() || (r.By == "cp-1") != (row.phase == admin.RotationStaged) || len(r.Waiting) != len(row.why) {
			t.Errorf("%s: %+v", name, r)
		}
		for _, w := range r.Waiting {
			if w.Why != string(row.why[w.Node]) {
				t.Errorf("%s: %+v", name, w)
			}
		}
	}
}

// TestEncrypting: a KEK may be pruned only once every node's kube-apiserver encrypts under
// the current KEK, by a record that counts.
func TestEncrypting(t *testing.T) {
	k := pair(t)
	still, early := recorded(k, "cp-2", k.CurrentID()), recorded(k, "cp-2", k.CurrentID())
	still.Record.Encrypted, early.Counts = "k1-old", false
	for name, row := range map[string]struct {
		second replica.Report
		why    string
	}{
		"current":         {recorded(k, "cp-2", k.CurrentID()), ""},
		"a former KEK":    {still, string(rotation.WhyNotEncrypted)},
		"from before":     {early, string(rotation.WhyNotFollowed)},
		"without records": {replica.Report{Node: "cp-2"}, string(rotation.WhyNoRecord)},
	} {
		all := Encrypting(k, []replica.Report{recorded(k, "cp-1", k.CurrentID()), row.second})
		if row.why == "" && len(all) == 0 {
			continue
		}
		if len(all) != 1 || all[0].Node != "cp-2" || all[0].Why != row.why {
			t.Errorf("%s: %+v", name, all)
		}
	}
}

// TestDrives: only the node that staged the KEK, or took the rotation over, drives it.
func TestDrives(t *testing.T) {
	k := pair(t)
	staged, err := k.Stage(newKEK(t), recoverySlots, time.Now())
	must(t, staged, err)
	elsewhere, err := staged.OnNode("cp-2", nil, nil)
	must(t, elsewhere, err)
	for name, row := range map[string]struct {
		k    *keyring.Keyring
		want bool
	}{"nothing staged": {k, false}, "staged here": {staged, true}, "staged elsewhere": {elsewhere, false}} {
		if got := drives(row.k); got != row.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestRefusals: what a rotation needs before it changes anything.
func TestRefusals(t *testing.T) {
	one, two := holding(t, "cp-1", alone(t), nil), holding(t, "cp-1", pair(t), nil)
	rotate := func(n *node.Node, req admin.RotateRequest) error {
		_, err := Rotate(t.Context(), n, req)
		return err
	}
	k, err := one.Unlocker.Keyring()
	if err != nil {
		t.Fatal(err)
	}
	before := k.CurrentID()
	if s, err := Rotate(t.Context(), one, admin.RotateRequest{Replace: "k1-former"}); err != nil || s.CurrentKeyID != before || s.Former != "k1-former" {
		t.Errorf("a repetition after another rotation: %+v, %v", s, err)
	}
	inStep := func(n *node.Node) error { _, err := GetInStep(t.Context(), n); return err }
	const noStore = "the keyring has 2 nodes, and this one has no access to the cluster store; nothing was changed"
	for name, row := range map[string]struct {
		err   error
		cause seal.Cause
		says  string
	}{
		"one node, continue":        {rotate(one, admin.RotateRequest{Continue: true}), "", "there is none to continue or abort"},
		"one node, abort":           {rotate(one, admin.RotateRequest{Abort: true}), "", "there is none to continue or abort"},
		"several nodes, no store":   {rotate(two, admin.RotateRequest{}), seal.CauseConfiguration, noStore},
		"several, no store, abort":  {rotate(two, admin.RotateRequest{Abort: true}), seal.CauseConfiguration, noStore},
		"several, no store, resume": {rotate(two, admin.RotateRequest{Continue: true}), seal.CauseConfiguration, noStore},
		"in step without a store":   {inStep(two), seal.CauseConfiguration, noStore},
	} {
		if row.err == nil || seal.CauseOf(row.err) != row.cause || !strings.Contains(row.err.Error(), row.says) {
			t.Errorf("%s: %v", name, row.err)
		}
	}
	if r, err := Watch(t.Context(), two); err != nil || r.Phase != admin.RotationDone {
		t.Errorf("without a store: %+v, %v", r, err)
	}
}

// TestAlreadyStaged: a second rotation is refused with the first one's key ID, and with the
// commands that take it over or end it.
func TestAlreadyStaged(t *testing.T) {
	err := alreadyStaged(&keyring.KEKInfo{KeyID: "k1-b", By: "cp-2", Created: time.Now()})
	as, ok := errors.AsType[*keyring.AlreadyStaged](err)
	if !ok || as.KeyID != "k1-b" || as.By != "cp-2" {
		t.Errorf("%v", err)
	}
	if _, hint := seal.SplitHint(err); !strings.Contains(hint, "kleidi rotate --continue") || !strings.Contains(hint, "kleidi rotate --abort") {
		t.Errorf("%q", hint)
	}
}

// TestSeveralNodes: a rotation of two nodes is staged, waits for the other node, refuses a
// second one, and ends with the former KEK when it is aborted.
func TestSeveralNodes(t *testing.T) {
	shared := &storetest.Memory{}
	k := pair(t)
	first, second := holding(t, "cp-1", k, shared), holding(t, "cp-2", k, shared)
	for _, n := range []*node.Node{first, second, first, second} {
		if err := n.Replica.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	o := Options{Shared: func(context.Context, *keyring.Keyring) (rotation.Wrap, error) {
		return func(context.Context, *seal.Secret) ([]seal.Slot, error) { return recoverySlots, nil }, nil
	}}
	r, err := Start(t.Context(), first, o)
	if err != nil || r.Phase != admin.RotationStaged || r.By != "cp-1" || r.StagedKeyID == "" {
		t.Fatalf("%+v, %v", r, err)
	}
	if !slices.ContainsFunc(r.Waiting, func(w admin.WaitingNode) bool { return w.Node == "cp-2" }) {
		t.Errorf("the rotation does not wait for cp-2: %+v", r)
	}
	if _, err := Start(t.Context(), first, o); err == nil || !strings.Contains(err.Error(), "another rotation is going on") {
		t.Errorf("a second rotation: %v", err)
	}
	s, err := WatchRotation(t.Context(), first, admin.WatchRotationRequest{})
	if err != nil || s.Rotation.StagedKeyID != r.StagedKeyID || s.CurrentKeyID != k.CurrentID() {
		t.Errorf("%+v, %v", s, err)
	}
	if s, err = Rotate(t.Context(), first, admin.RotateRequest{Abort: true}); err != nil || !slices.Contains(s.Changes, "the rotation is aborted; its KEK is retired, and nothing is encrypted under it") {
		t.Fatalf("%+v, %v", s, err)
	}
	if s.CurrentKeyID != k.CurrentID() || s.Former != "" {
		t.Errorf("the abort changed the current KEK: %+v", s)
	}
	for _, n := range []*node.Node{second, first} {
		if err := n.Replica.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if s, err = Rotate(t.Context(), first, admin.RotateRequest{Continue: true}); err != nil || !slices.Contains(s.Changes, "no rotation is going on") {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestRecords: while the cluster store is away, the records come from memory. A node that is
// behind says so in its record.
func TestRecords(t *testing.T) {
	shared := &storetest.Memory{}
	k := pair(t)
	first, second := holding(t, "cp-1", k, shared), holding(t, "cp-2", k, shared)
	for _, n := range []*node.Node{first, second, first, second, first} {
		if err := n.Replica.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	now, err := first.Unlocker.Keyring()
	if err != nil {
		t.Fatal(err)
	}
	check := func(when string) {
		t.Helper()
		all := Records(t.Context(), first, now)
		if all["cp-1"] == nil || all["cp-2"] == nil || all["cp-2"].Announced != k.CurrentID() || all["cp-2"].Behind != "" {
			t.Errorf("%s: %+v", when, all)
		}
	}
	check("read")
	shared.SetDown(seal.Errorf(seal.CauseUnavailable, "", "away"))
	check("from memory")
	shared.SetDown(nil)
	next, err := now.WithNode(keyring.Node{Name: "cp-3"}, time.Now())
	must(t, next, err)
	if all := Records(t.Context(), first, next); all["cp-2"] == nil || all["cp-2"].Behind != string(rotation.WhyNotFollowed) {
		t.Errorf("behind: %+v", all["cp-2"])
	}
	if Records(t.Context(), holding(t, "cp-1", k, nil), k) != nil || Cluster(holding(t, "cp-1", k, nil), k) != nil {
		t.Error("a node without a cluster store reports records")
	}
}

// TestWrapState: a node that demands two of two gets no slot from a node without the second
// wrapper, rather than a slot of its TPM alone.
func TestWrapState(t *testing.T) {
	n := holding(t, "cp-1", alone(t), nil)
	kek := newKEK(t)
	defer kek.Close()
	var wrapped int
	half := func(context.Context, *seal.Secret) (seal.Slot, error) {
		wrapped++
		return seal.Slot{Type: seal.TypeTPM}, nil
	}
	if s, err := wrapState(t.Context(), n, tpm.Peer{Node: "cp-2"}, kek, "", half); err != nil || s.Type != seal.TypeTPM || wrapped != 1 {
		t.Errorf("with the TPM alone: %+v, %v", s, err)
	}
	for _, second := range []string{seal.TypePKCS11, seal.TypeVault, "usb"} {
		if _, err := wrapState(t.Context(), n, tpm.Peer{Node: "cp-2"}, kek, second, half); seal.CauseOf(err) != seal.CauseConfiguration || wrapped != 1 {
			t.Errorf("%s: %v, wrapped %d times", second, err, wrapped)
		}
	}
}

// TestSameState: boot states are the same if they differ only in an empty or missing
// reference.
func TestSameState(t *testing.T) {
	a := keyring.RecordedState{Use: "signed", Signer: &keyring.RecordedKey{}}
	b := keyring.RecordedState{Use: "signed", Signer: &keyring.RecordedKey{Ref: []byte{}}}
	other := keyring.RecordedState{Use: "signed", Signer: &keyring.RecordedKey{Ref: []byte{1}}}
	if !sameState(a, b) || sameState(a, other) || sameState(a, keyring.RecordedState{Use: "present"}) {
		t.Errorf("%v %v", sameState(a, b), sameState(a, other))
	}
}

// TestWrapForAll: nobody wraps a KEK for a node without a TPM, or without a record.
func TestWrapForAll(t *testing.T) {
	n := holding(t, "cp-1", alone(t), nil)
	k, err := pair(t).WithNode(keyring.Node{Name: "cp-3"}, time.Now())
	must(t, k, err)
	kek := newKEK(t)
	defer kek.Close()
	record := &keyring.VerifiedRecord{}
	record.Node, record.BootStates = "cp-1", []keyring.RecordedState{{Use: "present"}}
	if all, err := wrapForAll(t.Context(), n, k, kek, []*keyring.VerifiedRecord{record}); err != nil || len(all) != 0 {
		t.Errorf("%+v, %v", all, err)
	}
}
