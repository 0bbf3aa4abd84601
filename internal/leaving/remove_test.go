package leaving

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/replica"
)

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

var recoverySlots = []seal.Slot{{Type: seal.TypeRecovery, Data: []byte("{}")}}

// threeNodes returns the keyring of cp-1, cp-2 and cp-3, as cp-1 holds it.
func threeNodes(t *testing.T) *keyring.Keyring {
	t.Helper()
	first, err := keyring.New(seal.ClusterID{1}, newKEK(t), recoverySlots, []keyring.Node{{Name: "cp-1"}}, time.Now())
	must(t, first, err)
	k, err := first.Upgrade(keyring.Node{Name: "cp-1"})
	must(t, k, err)
	for _, name := range []string{"cp-2", "cp-3"} {
		k, err = k.WithNode(keyring.Node{Name: name}, time.Now())
		must(t, k, err)
	}
	return k
}

// TestKnown: what the names of a request are to the cluster.
func TestKnown(t *testing.T) {
	whole := threeNodes(t)
	without, err := whole.WithoutNode("cp-3")
	must(t, without, err)
	for name, row := range map[string]struct {
		k    *keyring.Keyring
		ask  []string
		want names
		says string
	}{
		"this node":          {whole, []string{"cp-2", "cp-1"}, names{}, "node cp-1 is this one; run the command on another node"},
		"a node":             {whole, []string{"cp-3"}, names{listed: []string{"cp-3"}}, ""},
		"no node":            {whole, []string{"cp-9"}, names{unknown: []string{"cp-9"}}, ""},
		"an approved name":   {whole, []string{"cp-8"}, names{approved: []string{"cp-8"}}, ""},
		"approved again":     {whole, []string{"cp-2"}, names{listed: []string{"cp-2"}}, ""},
		"a removed node":     {without, []string{"cp-3"}, names{former: []string{"cp-3"}}, ""},
		"removed and listed": {without, []string{"cp-3", "cp-2"}, names{listed: []string{"cp-2"}, former: []string{"cp-3"}}, ""},
	} {
		got, err := known(row.k, []string{"cp-2", "cp-8"}, row.ask)
		if row.says != "" {
			if err == nil || !strings.Contains(err.Error(), row.says) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		got.nodes = nil
		if err != nil || !reflect.DeepEqual(got, row.want) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

// TestToCutOff: a command asks to cut off only the nodes that it will remove. While nodes have
// yet to trust a fresh KEK, a name may be that of a removed node.
func TestToCutOff(t *testing.T) {
	settling := &admin.ClusterReport{Rotation: &admin.Rotation{Phase: admin.RotationSettling}}
	l := admin.NodeList{
		Nodes: []admin.NodeReport{{Node: "cp-1", Self: true}, {Node: "cp-2"}}, Former: []string{"cp-3"},
		Approvals: []admin.UnusedApproval{{Node: "cp-8"}}, Cluster: &admin.ClusterReport{Rotation: &admin.Rotation{Phase: admin.RotationStaged}},
	}
	for name, row := range map[string]struct {
		cluster *admin.ClusterReport
		ask     []string
		cut     []string
		says    string
	}{
		"nodes":             {l.Cluster, []string{"cp-2", "cp-3"}, []string{"cp-2", "cp-3"}, ""},
		"with an approval":  {nil, []string{"cp-2", "cp-8"}, []string{"cp-2"}, ""},
		"only an approval":  {nil, []string{"cp-8"}, []string{}, ""},
		"this node":         {nil, []string{"cp-1"}, nil, "remove: node cp-1 is this one"},
		"no store":          {nil, []string{"cp-2", "cp-9"}, nil, "remove: node cp-9 is not in the keyring, and no removed node of that name knows its current KEK; the nodes are cp-1, cp-2; kleidi node list shows the nodes"},
		"during a rotation": {l.Cluster, []string{"cp-9"}, nil, "remove: node cp-9 is not in the keyring"},
		"settling":          {settling, []string{"cp-9"}, []string{"cp-9"}, ""},
	} {
		l.Cluster = row.cluster
		cut, err := ToCutOff(l, row.ask)
		if (err == nil) != (row.says == "") || err != nil && !strings.HasPrefix(err.Error(), row.says) || !slices.Equal(cut, row.cut) {
			t.Errorf("%s: %q, %v", name, cut, err)
		}
	}
}

// TestCheckShared: a removal must leave one node, or nodes that share the cluster store, since
// their KEK could not be replaced otherwise.
func TestCheckShared(t *testing.T) {
	local := threeNodes(t)
	cluster, err := local.InCluster()
	must(t, cluster, err)
	elsewhere, err := local.OnNode("cp-2", nil, nil)
	must(t, elsewhere, err)
	without, with := &node.Node{}, &node.Node{Replica: &replica.Replica{}}
	for name, row := range map[string]struct {
		n       *node.Node
		k       *keyring.Keyring
		leaving []string
		says    string
	}{
		"one remains":                  {without, local, []string{"cp-2", "cp-3"}, ""},
		"two remain, without a store":  {without, cluster, []string{"cp-3"}, "2 nodes would remain"},
		"two remain, not handed over":  {with, local, []string{"cp-3"}, "2 nodes would remain"},
		"two remain, in the store":     {with, cluster, []string{"cp-3"}, ""},
		"run on a node without a seat": {without, elsewhere, []string{"cp-1", "cp-3"}, "only node cp-1 can change"},
	} {
		err := checkShared(row.n, row.k, row.leaving)
		if row.says == "" && err != nil || row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestPhase: the phases of a removal. It is over only when every remaining node trusts
// the fresh KEK alone.
func TestPhase(t *testing.T) {
	whole := threeNodes(t)
	dropped, err := whole.WithoutNode("cp-3")
	must(t, dropped, err)
	staged, err := dropped.Stage(newKEK(t), recoverySlots, time.Now())
	must(t, staged, err)
	active, err := staged.Activate(time.Now())
	must(t, active, err)
	done, behind := &admin.Rotation{Phase: admin.RotationDone}, &admin.Rotation{Phase: "settling", Waiting: []admin.WaitingNode{{Node: "cp-2"}}}
	for name, row := range map[string]struct {
		k        *keyring.Keyring
		rotation *admin.Rotation
		phase    admin.RemovalPhase
		trusting []string
	}{
		"before":          {whole, done, admin.RemovalDone, nil},
		"dropped":         {dropped, done, admin.RemovalFollowing, []string{"cp-1", "cp-2"}},
		"staged":          {staged, behind, admin.RemovalStaged, []string{"cp-1", "cp-2"}},
		"one node behind": {active, behind, admin.RemovalSettling, []string{"cp-2"}},
		"over":            {active, done, admin.RemovalDone, nil},
	} {
		r := &admin.NodeRemoval{Former: row.k.Info().Former, Waiting: row.rotation.Waiting}
		if got := phase(row.k, row.rotation); got != row.phase {
			t.Errorf("%s: phase %s, want %s", name, got, row.phase)
		}
		if got := trusting(row.k, r); !slices.Equal(got, row.trusting) {
			t.Errorf("%s: %q still trust the former KEK, want %q", name, got, row.trusting)
		}
	}
}

// TestDescribeStates: the ways into the keyring name each unusual kind of boot state once.
func TestDescribeStates(t *testing.T) {
	present, next, suspension := keyring.RecordedState{Use: "present"}, keyring.RecordedState{Use: "next"}, keyring.RecordedState{Use: "suspension"}
	signed := keyring.RecordedState{Signer: &keyring.RecordedKey{}}
	for want, states := range map[string][]keyring.RecordedState{
		"1 boot state":                {present},
		"2 boot states":               {present, present},
		"1 boot state (also: signed)": {signed},
		"5 boot states (also: next, suspension, signed)": {present, next, next, suspension, signed},
	} {
		if got := describeStates(states); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
