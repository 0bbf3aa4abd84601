package carry

import (
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

func must(t *testing.T, k *keyring.Keyring, err error) *keyring.Keyring {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

// shared returns a keyring of the nodes cp-1 and cp-2, in a cluster of its own.
func shared(t *testing.T, cluster byte) *keyring.Keyring {
	t.Helper()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	slots := []seal.Slot{{Type: seal.TypeRecovery, Data: []byte("{}")}}
	k, err := keyring.New(seal.ClusterID{cluster}, kek, slots, []keyring.Node{{Name: "cp-1"}}, time.Now())
	first := must(t, k, err)
	k, err = first.Upgrade(keyring.Node{Name: "cp-1"})
	alone := must(t, k, err)
	k, err = alone.WithNode(keyring.Node{Name: "cp-2"}, time.Now())
	return must(t, k, err)
}

// TestCarry: a file carries a keyring from node to node. A node takes only a newer
// keyring of its own cluster.
func TestCarry(t *testing.T) {
	ctx := t.Context()
	before := shared(t, 1)
	k, err := before.WithNode(keyring.Node{Name: "cp-3"}, time.Now())
	after := must(t, k, err)
	sender, receiver := nodetest.Holding(t, "cp-1", after), nodetest.Holding(t, "cp-2", before)
	export := func(n *node.Node) admin.ImportKeyringRequest {
		t.Helper()
		e, err := Export(ctx, n, admin.ExportKeyringRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return admin.ImportKeyringRequest{Keyring: e.Keyring, Record: e.Record}
	}
	old, newer := export(receiver), export(sender)
	foreign := export(nodetest.Holding(t, "cp-1", shared(t, 2)))
	for _, step := range []struct {
		name, says string
		refused    bool
		req        admin.ImportKeyringRequest
	}{
		{"no keyring", "import: parse keyring", true, admin.ImportKeyringRequest{Keyring: []byte("{}"), Record: newer.Record}},
		{"no record", "import: parse record", true, admin.ImportKeyringRequest{Keyring: newer.Keyring, Record: []byte("{}")}},
		{"of another cluster", "cluster", true, foreign},
		{"newer", "has taken the keyring of revision 4", false, newer},
		{"the same again", "has that keyring already", false, newer},
		{"older", "older than this node's, which has revision 4", true, old},
	} {
		state, err := Import(ctx, receiver, step.req)
		if step.refused {
			if err == nil || !strings.Contains(err.Error(), step.says) {
				t.Errorf("%s: %v", step.name, err)
			}
			continue
		}
		if err != nil || len(state.Changes) != 1 || !strings.Contains(state.Changes[0], step.says) || state.Revision != after.Revision() {
			t.Errorf("%s: %+v, %v", step.name, state, err)
		}
	}
}

// TestCarryNeedsAnOpenKeyring: a locked node gives nothing away, and takes nothing.
func TestCarryNeedsAnOpenKeyring(t *testing.T) {
	e, err := Export(t.Context(), nodetest.Holding(t, "cp-1", shared(t, 1)), admin.ExportKeyringRequest{})
	if err != nil {
		t.Fatal(err)
	}
	locked := nodetest.New(t, nodetest.Named("cp-2"), nodetest.Opens(seal.TypePKCS11))
	if _, err := Export(t.Context(), locked, admin.ExportKeyringRequest{}); err == nil {
		t.Error("a locked node exports")
	}
	if _, err := Import(t.Context(), locked, admin.ImportKeyringRequest{Keyring: e.Keyring, Record: e.Record}); err == nil {
		t.Error("a locked node imports")
	}
	if _, _, err := locked.Stored(t.Context()); seal.CauseOf(err) != seal.CauseKeyringMissing {
		t.Errorf("a locked node stored what it was given: %v", err)
	}
}

// TestPublishNeedsTheStore: without access to the cluster store, Publish refuses and says
// why.
func TestPublishNeedsTheStore(t *testing.T) {
	_, err := Publish(t.Context(), nodetest.Holding(t, "cp-1", shared(t, 1)), admin.PublishKeyringRequest{})
	if seal.CauseOf(err) != seal.CauseConfiguration || !strings.Contains(err.Error(), "no access to the cluster store") {
		t.Error(err)
	}
}
