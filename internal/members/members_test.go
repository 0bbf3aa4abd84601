package members

import (
	"bytes"
	"context"
	"crypto"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/grpcserver/join"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/foundingtest"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/replica/storetest"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/attest/joinproof"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// machine returns a machine with its configuration.
func machine(t *testing.T, name string, change ...func(*config.Config)) *node.Node {
	t.Helper()
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	dir := t.TempDir()
	c := config.Default()
	c.Node, c.State.Dir, c.Memory.Lock = name, filepath.Join(dir, "state"), config.LockBestEffort
	c.TPM.Device, c.TPM.EventLog, c.TPM.UserspaceEventLog = m.Device(), m.EventLog(), m.UserspaceLog()
	c.Admin.Socket = filepath.Join(dir, "admin.sock")
	for _, f := range change {
		f(c)
	}
	n, err := node.New(c, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	return n
}

// seat is a node with an open keyring, and its desk, which listens.
func seat(t *testing.T, change ...func(*config.Config)) (*node.Node, *Desk) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := machine(t, "alpha", append(change, func(c *config.Config) { c.Join.Listen = l.Addr().String() })...)
	foundingtest.FoundOpen(t, n)
	d, err := NewDesk(n)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- d.server.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		d.Stop(ctx)
		<-done
	})
	return n, d
}

// approve approves a machine, and returns what it joins with.
func approve(t *testing.T, d *Desk, n *node.Node, change ...func(*admin.ApproveNodeRequest)) JoinOptions {
	t.Helper()
	id, err := Identify(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	log, err := attest.Logs{Firmware: n.Config.TPM.EventLog, Userspace: n.Config.TPM.UserspaceEventLog}.Read()
	if err != nil {
		t.Fatal(err)
	}
	p, err := bootpolicy.Record(log, crypto.SHA256, []int{0, 4, 7, 11})
	if err != nil {
		t.Fatal(err)
	}
	req := admin.ApproveNodeRequest{Node: id.Node, EK: id.EK, BootPolicy: p.Marshal(), Expires: time.Hour}
	for _, f := range change {
		f(&req)
	}
	r, err := d.Approve(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := keyring.ParseTrust(r.Trust)
	if err != nil {
		t.Fatal(err)
	}
	return JoinOptions{Address: r.Address, Verifier: r.Certificate, Trust: trust, Progress: func(string) {}}
}

// half joins up to the received keyring. The other node does not learn that it was opened.
func half(t *testing.T, n *node.Node, o JoinOptions) (*keyring.Keyring, error) {
	t.Helper()
	j := &joiner{Node: n, JoinOptions: o}
	client, err := join.NewClient(o.Address, o.Verifier)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	grant, err := retried(func() (*join.Grant, error) { return j.prove(t.Context(), client) })
	if err != nil {
		return nil, err
	}
	defer j.session.Close()
	k, err := j.open(t.Context(), grant)
	if err == nil {
		t.Cleanup(k.Close)
	}
	return k, err
}

// retried repeats a join while a busy machine may be the reason that it failed.
func retried[T any](try func() (T, error)) (r T, err error) {
	deadline := time.Now().Add(2 * time.Minute)
	for unanswered := 0; ; {
		if r, err = try(); err == nil || time.Now().After(deadline) {
			return r, err
		}
		switch {
		case strings.Contains(err.Error(), "another join of this node is in progress"):
			// the other node learns only a moment later that an earlier join has broken off
		case strings.Contains(err.Error(), "check that kleidi serve runs there") && unanswered < 5:
			unanswered++ // the other node gives this one 3 s for its hello, and 15 s for its proof
		default:
			return r, err
		}
	}
}

// tryJoin joins.
func tryJoin(t *testing.T, n *node.Node, o JoinOptions) (*JoinResult, error) {
	t.Helper()
	return retried(func() (*JoinResult, error) { return Join(t.Context(), n, o) })
}

// change makes revisions as another node of the cluster does, and this node follows.
func change(t *testing.T, n *node.Node, f func(k *keyring.Keyring) (*keyring.Keyring, error)) {
	t.Helper()
	err := n.Unlocker.Change(t.Context(), func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := f(k)
		return []*keyring.Keyring{next}, err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestRemovedElsewhere: a node that another node has removed receives nothing by the approval
// with which it joined, even if it never said that it was done.
func TestRemovedElsewhere(t *testing.T) {
	n, d := seat(t)
	j := machine(t, "beta")
	o := approve(t, d, j)
	for _, what := range []string{"at first", "again, before it is removed"} {
		if _, err := half(t, j, o); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	change(t, n, func(k *keyring.Keyring) (*keyring.Keyring, error) { return k.WithoutNode("beta") })
	for _, words := range []string{"node 'beta' was removed after this approval", "node 'beta' is not approved"} {
		if _, err := half(t, j, o); err == nil || !strings.Contains(err.Error(), words) || !strings.Contains(err.Error(), "kleidi node approve") {
			t.Errorf("the removed node joins again: %v; want %s", err, words)
		}
	}
	if k, err := n.Unlocker.Keyring(); err != nil || len(k.Nodes()) != 1 || len(d.server.Unfinished()) != 0 {
		t.Errorf("unfinished %v, %v", d.server.Unfinished(), err)
	}
	if _, err := half(t, j, approve(t, d, j)); err != nil {
		t.Errorf("approved again: %v", err)
	}
}

// TestRemovedBeforeUse: an approval that was never used here ends as well when its node
// joined by another node's approval and was removed there: at once, and once the fresh KEK is
// current, with which the keyring forgets its former nodes.
func TestRemovedBeforeUse(t *testing.T) {
	for _, row := range []struct {
		words   string
		rotated bool
	}{{"node 'beta' was removed after this approval", false}, {"the KEK was rotated after this approval, as a removal of node 'beta' does", true}} {
		n, d := seat(t)
		j := machine(t, "beta")
		o := approve(t, d, j)
		id, err := Identify(t.Context(), j)
		if err != nil {
			t.Fatal(err)
		}
		elsewhere := keyring.Node{Name: "beta", EK: id.EK, SRK: []byte("its"), EpochIndex: keyring.FirstEpochIndex}
		change(t, n, func(k *keyring.Keyring) (*keyring.Keyring, error) { return k.WithNode(elsewhere, time.Now()) })
		change(t, n, func(k *keyring.Keyring) (*keyring.Keyring, error) { return k.WithoutNode("beta") })
		if row.rotated {
			stage(t, n)
			change(t, n, func(k *keyring.Keyring) (*keyring.Keyring, error) { return k.Activate(time.Now()) })
		}
		if _, err := half(t, j, o); err == nil || !strings.Contains(err.Error(), row.words) {
			t.Errorf("%v; want %s", err, row.words)
		}
		if _, err := half(t, j, approve(t, d, j)); err != nil {
			t.Errorf("approved again: %v", err)
		}
	}
}

// TestDroppedJoinsAgain: a node whose keyring is older than its new approval joins, although
// that keyring still opens here. A node that the approval knows has nothing to do.
func TestDroppedJoinsAgain(t *testing.T) {
	n, d := seat(t)
	j := machine(t, "beta")
	o := approve(t, d, j)
	for _, before := range []bool{false, true} {
		if r, err := tryJoin(t, j, o); err != nil || r.Before != before {
			t.Fatalf("before %v: %+v, %v", before, r, err)
		}
	}
	change(t, n, func(k *keyring.Keyring) (*keyring.Keyring, error) { return k.WithoutNode("beta") })
	r, err := tryJoin(t, j, approve(t, d, j))
	if err != nil || r.Before {
		t.Fatalf("%+v, %v", r, err)
	}
	k, err := n.Unlocker.Keyring()
	if err != nil || listedAs(k, "beta") == nil || r.Revision != k.Revision() {
		t.Errorf("the keyring does not list the node: %v", err)
	}
}

// TestFinishedByRecord: a node that works has finished joining, even if this node was not told.
func TestFinishedByRecord(t *testing.T) {
	reaches := func(c *config.Config) { c.Cluster.Kubeconfig = filepath.Join(c.State.Dir, "unused") }
	n, _ := seat(t, reaches)
	w, j := wrongDesk(t, n), machine(t, "beta", reaches)
	w.alter = func(_ *joinproof.Proven, a *join.Admission) { a.Done = func([]byte) []byte { return nil } } // the last message is lost
	shared := &storetest.Memory{}
	for _, n := range []*node.Node{n, j} {
		n.Replica = replica.New(replica.Config{Store: shared, Unlocker: n.Unlocker, Log: slog.New(slog.DiscardHandler)})
	}
	if _, err := tryJoin(t, j, approve(t, w.Desk, j)); err != nil {
		t.Fatal(err)
	}
	if err := j.Unlocker.Unlock(t.Context()); err != nil {
		t.Fatal(err)
	}
	unfinished := func() bool {
		t.Helper()
		l, err := w.List(t.Context(), admin.ListNodesRequest{})
		if err != nil || len(l.Nodes) != 2 {
			t.Fatalf("%+v, %v", l, err)
		}
		return l.Nodes[1].Unfinished
	}
	for _, r := range []*replica.Replica{n.Replica, n.Replica} {
		if err := r.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if !unfinished() {
		t.Error("nothing shows that it opened the KEK")
	}
	if err := j.Replica.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if unfinished() {
		t.Error("its record shows that it opened the KEK")
	}
}

// TestNameTaken: a machine that was approved for a name does not take the place of a machine
// that another node has listed under that name since.
func TestNameTaken(t *testing.T) {
	n, d := seat(t)
	j := machine(t, "beta")
	o := approve(t, d, j)
	first := keyring.Node{Name: "beta", EK: "sha256:" + strings.Repeat("1", 64), SRK: []byte("first"), EpochIndex: keyring.FirstEpochIndex}
	other := first
	other.EK = "sha256:" + strings.Repeat("2", 64)
	list := func(m keyring.Node) {
		change(t, n, func(k *keyring.Keyring) (*keyring.Keyring, error) { return k.WithNode(m, time.Now()) })
	}
	refused := func(what string) {
		t.Helper()
		if _, err := half(t, j, o); err == nil || !strings.Contains(err.Error(), "another machine has become node 'beta' since the approval") {
			t.Errorf("%s: %v", what, err)
		}
	}
	list(first)
	refused("no node had that name")
	o = approve(t, d, j, func(r *admin.ApproveNodeRequest) { r.Replace = true })
	list(other)
	refused("the operator replaced another machine")
	o = approve(t, d, j, func(r *admin.ApproveNodeRequest) { r.Replace = true })
	if _, err := half(t, j, o); err != nil {
		t.Errorf("the operator has seen the machine: %v", err)
	}
	k, err := n.Unlocker.Keyring()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := withoutTPM(k, admin.ApproveNodeRequest{Node: "beta", NoTPM: true, Expires: time.Hour}); err == nil || !strings.Contains(err.Error(), "give --replace") {
		t.Errorf("a machine without a TPM: %v", err)
	}
}

// TestOneName: a machine is a node under one name. The refusal names that node, and what to do.
// A machine that became a node under another name since its approval is refused when it joins.
func TestOneName(t *testing.T) {
	n, d := seat(t)
	second := machine(t, "beta")
	if _, err := tryJoin(t, second, approve(t, d, second)); err != nil {
		t.Fatal(err)
	}
	id, err := Identify(t.Context(), second)
	if err != nil {
		t.Fatal(err)
	}
	k, err := n.Unlocker.Keyring()
	if err != nil {
		t.Fatal(err)
	}
	_, err = d.Approve(t.Context(), admin.ApproveNodeRequest{Node: "gamma", EK: id.EK, Expires: time.Hour})
	if err == nil || !strings.Contains(err.Error(), "approve: the machine with that endorsement key is node beta already; to let it join again, run kleidi node approve beta --ek "+id.EK+
		"; to give it another name, run kleidi node remove beta first") {
		t.Error(err)
	}
	if _, _, err := withNode(k, keyring.Node{Name: "gamma", EK: id.EK, EpochIndex: keyring.FirstEpochIndex}, seenOf(k, "gamma")); err == nil || !strings.Contains(err.Error(), "is node beta already") {
		t.Errorf("listed since the approval: %v", err)
	}
}

// stage begins a rotation.
func stage(t *testing.T, n *node.Node) *keyring.Keyring {
	t.Helper()
	change(t, n, func(k *keyring.Keyring) (*keyring.Keyring, error) {
		revisions, err := rotation.Rotate(t.Context(), seal.Memory{}, k, rotation.Like(n.Rewrappers(), k.Slots()), n.Wrappers(), time.Now())
		if err != nil {
			return nil, err
		}
		revisions[1].Close()
		return revisions[0], nil // it stops there
	})
	staged, err := n.Unlocker.Keyring()
	if err != nil || staged.StagedID() == "" {
		t.Fatalf("nothing is staged: %v", err)
	}
	return staged
}

// TestReplaceWhileStaged: a machine that takes another's place ends the rotation, whose KEK
// the other machine may know.
func TestReplaceWhileStaged(t *testing.T) {
	n, d := seat(t)
	var logged bytes.Buffer
	n.Log = slog.New(slog.NewTextHandler(&logged, nil))
	j := machine(t, "beta")
	approve(t, d, j) // the keyring has the format of several nodes from now on
	first := keyring.Node{Name: "beta", EK: "sha256:" + strings.Repeat("1", 64), SRK: []byte("first"), EpochIndex: keyring.FirstEpochIndex}
	change(t, n, func(k *keyring.Keyring) (*keyring.Keyring, error) { return k.WithNode(first, time.Now()) })
	o := approve(t, d, j, func(r *admin.ApproveNodeRequest) { r.Replace = true })
	id := stage(t, n).StagedID()
	theirs, err := half(t, j, o)
	if err != nil {
		t.Fatal(err)
	}
	if i := theirs.Info(); i.Staged != nil || !slices.Equal(i.Former, []string{"beta"}) || !theirs.Holds(id) {
		t.Errorf("%+v", i)
	}
	if k, err := n.Unlocker.Keyring(); err != nil || k.StagedID() != "" || !strings.Contains(logged.String(), "the rotation is aborted, because the replaced machine may know its KEK") {
		t.Errorf("staged %s, %v, log %s", k.StagedID(), err, logged.String())
	}
}

// TestJoinWhileStaged: a node that joins during a rotation is given the staged KEK too, and
// keeps slots of its own for both, so that it can acknowledge.
func TestJoinWhileStaged(t *testing.T) {
	n, d := seat(t)
	j := machine(t, "beta")
	o := approve(t, d, j)
	staged := stage(t, n)
	if _, err := tryJoin(t, j, o); err != nil {
		t.Fatal(err)
	}
	if err := j.Unlocker.Unlock(t.Context()); err != nil {
		t.Fatal(err)
	}
	k, err := j.Unlocker.Keyring()
	if err != nil {
		t.Fatal(err)
	}
	if id := staged.StagedID(); k.StagedID() != id || !k.Holds(id) || !k.Acknowledged() || len(k.OwnStagedSlots()) != 1 || len(k.OwnSlots()) != 1 {
		t.Errorf("staged %q, held: %v, acknowledged: %v, %d and %d own slots", k.StagedID(), k.Holds(id), k.Acknowledged(), len(k.OwnStagedSlots()), len(k.OwnSlots()))
	}
	for _, s := range append(k.OwnSlots(), k.OwnStagedSlots()...) {
		if strings.Contains(string(s.Data), "import-v1") {
			t.Error("an import slot is kept")
		}
	}
	if slices.ContainsFunc(k.StagedSlots(), func(s seal.Slot) bool { return s.Node == "alpha" }) {
		t.Error("the other node's own slots came along")
	}
}

// TestStagedClosed: a node whose staged KEK does not open hands out no keyring that
// lacks this KEK, and adds no node.
func TestStagedClosed(t *testing.T) {
	n, d := seat(t)
	j := machine(t, "beta")
	o := approve(t, d, j)
	before, err := n.Unlocker.Keyring()
	if err != nil {
		t.Fatal(err)
	}
	d.reviser = closedStaged{t, n}
	if _, err := tryJoin(t, j, o); err == nil || !strings.Contains(err.Error(), "can't list this node") {
		t.Errorf("%v", err)
	}
	if k, err := n.Unlocker.Keyring(); err != nil || k.Revision() != before.Revision() {
		t.Errorf("the keyring has changed: %v", err)
	}
	if _, _, err := j.Keyring.File.Load(t.Context()); err == nil {
		t.Error("the machine has a keyring")
	}
	d.reviser = n.Unlocker
	if _, err := tryJoin(t, j, o); err != nil {
		t.Errorf("once it is mended: %v", err)
	}
}

// closedStaged shows a keyring whose staged KEK is not open.
type closedStaged struct {
	t *testing.T
	n *node.Node
}

// Change implements Reviser.
func (c closedStaged) Change(ctx context.Context, f func(*keyring.Keyring) ([]*keyring.Keyring, error)) error {
	k, err := c.n.Unlocker.Keyring()
	if err != nil {
		return err
	}
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		return err
	}
	staged, err := k.Stage(kek, nil, time.Now())
	if err != nil {
		return err
	}
	defer staged.Close()
	u, err := keyring.Parse(staged.Marshal())
	if err != nil {
		return err
	}
	var copied *seal.Secret
	k.KEK().With(func(b []byte) { copied, err = seal.Memory{}.Take(slices.Clone(b)) })
	if err != nil {
		return err
	}
	closed, err := u.Open(copied, nil)
	if err != nil {
		return err
	}
	defer closed.Close()
	if _, err := f(closed); err != nil {
		return err
	}
	c.t.Error("it is given away")
	return nil
}
