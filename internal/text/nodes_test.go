package text

import (
	"io"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/leaving"
	"github.com/beezy-dev/kleidi/internal/members"
	"github.com/beezy-dev/kleidi/seal"
)

// TestProgress: what a rotation waits for, in each phase.
func TestProgress(t *testing.T) {
	one := []admin.WaitingNode{{Node: "cp-2", Why: "it is away", Problem: "locked"}}
	for name, row := range map[string]struct {
		r    admin.Rotation
		want string
	}{
		"preparing":    {admin.Rotation{Phase: admin.RotationPreparing, Waiting: one}, "nothing is staged before each node has followed the present keyring:\n  node cp-2: it is away; it says: locked"},
		"staged":       {admin.Rotation{Phase: admin.RotationStaged, Waiting: one}, "waiting for each node to acknowledge the fresh KEK:\n  node cp-2: it is away; it says: locked"},
		"acknowledged": {admin.Rotation{Phase: admin.RotationStaged}, "every node has acknowledged the fresh KEK, which becomes current"},
		"settling":     {admin.Rotation{Phase: admin.RotationSettling, Waiting: []admin.WaitingNode{{Node: "cp-3", Why: "slow"}}}, "waiting for each node to announce the current KEK:\n  node cp-3: slow"},
	} {
		if got := Progress(&row.r); got != row.want {
			t.Errorf("%s: %q, want %q", name, got, row.want)
		}
	}
}

// TestRotation: a rotation that is over names nothing to do. One that did not begin says
// that nothing was changed, and one that goes on says who goes on with it.
func TestRotation(t *testing.T) {
	const state = "current key ID  k1-a|revision        3|"
	const staged = "staged key ID   k1-b|staged by       node cp-1, 2026-01-02 12:00:00|"
	for phase, want := range map[admin.RotationPhase]string{
		admin.RotationDone:      state,
		admin.RotationPreparing: state + "nothing is staged before each node has followed the present keyring:|nothing was changed; run kleidi rotate again when they have",
		admin.RotationStaged:    state + staged + "every node has acknowledged the fresh KEK, which becomes current|kleidi serve goes on with it; watch it with kleidi rotate --continue --wait",
	} {
		r := &admin.Rotation{Phase: phase}
		if phase == admin.RotationStaged {
			r.StagedKeyID, r.By, r.Since = "k1-b", "cp-1", at(2)
		}
		renders(t, string(phase), func(w io.Writer) { Rotation(w, admin.KeyringState{CurrentKeyID: "k1-a", Revision: 3, Rotation: r}) },
			strings.Split(strings.TrimSuffix(want, "|"), "|")...)
	}
}

// TestCluster: the node's knowledge of the store, each node that is behind, and the
// rotation that is going on.
func TestCluster(t *testing.T) {
	behind := []admin.WaitingNode{{Node: "cp-2", Why: "it is away"}}
	renders(t, "no store", func(w io.Writer) { cluster(w, nil) }, "")
	renders(t, "never read", func(w io.Writer) {
		cluster(w, &admin.ClusterReport{Problem: &admin.Problem{Message: "no route"}, Rotation: &admin.Rotation{}})
	}, "cluster store  not in step, never read", "                 no route")
	renders(t, "settling", func(w io.Writer) {
		cluster(w, &admin.ClusterReport{InStep: true, Reached: at(1), Revision: 5, Behind: behind, Rotation: &admin.Rotation{Waiting: behind}})
	}, "cluster store  in step, read 2026-01-01 12:00:00, revision 5", "BEHIND         node cp-2: it is away")
	renders(t, "rotating", func(w io.Writer) {
		cluster(w, &admin.ClusterReport{InStep: true, Reached: at(1), Revision: 5, Rotation: &admin.Rotation{StagedKeyID: "k1-b", By: "cp-3", Since: at(2), Waiting: behind}})
	}, "cluster store  in step, read 2026-01-01 12:00:00, revision 5", "ROTATION       node cp-3 staged key ID k1-b, 2026-01-02 12:00:00", "waiting for    node cp-2: it is away")
}

// TestNodes: the notes of a node, its record, and what a former node still knows.
func TestNodes(t *testing.T) {
	l := admin.NodeList{ClusterID: "c1", KeyID: "k1-a", Revision: 9, Format: 2, Stored: true,
		Nodes: []admin.NodeReport{
			{Node: "cp-1", EK: "sha256:11", Self: true, Seat: true, Added: at(1)},
			{Node: "cp-2", Unfinished: true},
			{Node: "cp-3", EK: "sha256:33", Record: &admin.NodeRecord{Revision: 8, Anchored: "k1-0", Announced: "k1-a", Encrypted: "k1-0", Acknowledged: "k1-b",
				Version: "v1", Formats: []int{1, 2}, BootStates: 2, Started: at(3), Behind: "it is behind", Problem: "locked"}},
			{Node: "cp-4", EK: "sha256:44", Record: &admin.NodeRecord{Revision: 9, Anchored: "k1-a", Announced: "k1-a", Encrypted: "k1-a", Version: "v1", Formats: []int{2}, BootStates: 1, Started: at(4)}},
		},
		Former:    []string{"cp-2", "cp-9"},
		Approvals: []admin.UnusedApproval{{Node: "cp-5", EK: "sha256:55", Until: at(5)}, {Node: "cp-6", EK: "sha256:66", Until: at(1), Expired: true}},
	}
	renders(t, "nodes", func(w io.Writer) { Nodes(w, l) },
		"cluster ID     c1",
		"current key ID k1-a",
		"revision       9 (format 2)",
		"cp-1           sha256:11 (seat, this one)  added 2026-01-01 12:00:00",
		"cp-2           (has not finished joining, no TPM)",
		"cp-3           sha256:33",
		"  revision 8, anchored and announced k1-a, kleidi v1 (formats [1 2]), 2 boot states, started 2026-01-03 12:00:00",
		"  anchored k1-0",
		"  kube-apiserver last encrypted under k1-0",
		"  acknowledged k1-b",
		"  it is behind",
		"  it says: locked",
		"cp-4           sha256:44",
		"  revision 9, anchored and announced k1-a, kleidi v1 (formats [2]), 1 boot state, started 2026-01-04 12:00:00",
		"cp-2           replaced: the former machine of that name still knows the current KEK, until a rotation with kleidi rotate has ended",
		"cp-9           removed; it still knows the current KEK, until kleidi node remove cp-9 has ended",
		"cp-5           has not joined; approved until 2026-01-05 12:00:00, with EK sha256:55",
		"cp-6           has not joined, and its approval has expired",
		"kleidi serve does not run: this is the stored keyring, which nothing has verified",
	)
}

// TestRemoval: a removal ends with "done" only in its last phase. In any other phase, the
// last line is the command that continues it, with every node. If only approvals were
// withdrawn, it does not speak of a fresh KEK.
func TestRemoval(t *testing.T) {
	r := admin.NodeRemoval{Nodes: []string{"cp-2", "cp-3"}, CurrentKeyID: "k1-a", Revision: 4, WaysIn: []string{"slot recovery"}, Changes: []string{"one"}}
	head := []string{"- one", "current key ID k1-a", "revision       4", "these ways into the keyring stay; a removed node may have added one of them:", "  slot recovery"}
	r.Phase = admin.RemovalDone
	renders(t, "done", func(w io.Writer) { Removal(w, r) }, append(head, "done: every remaining node trusts only the fresh KEK, which no removed node has had")...)
	withdrawn := admin.NodeRemoval{Nodes: []string{}, Phase: admin.RemovalDone, CurrentKeyID: "k1-a", Revision: 4, Changes: []string{"one"}}
	renders(t, "only approved", func(w io.Writer) { Removal(w, withdrawn) }, head[:3]...)
	r.Waiting, r.Trusting = []admin.WaitingNode{{Node: "cp-1", Why: "slow"}}, []string{"cp-1", "cp-4"}
	for phase, first := range map[admin.RemovalPhase]string{
		admin.RemovalFollowing: "waiting for each remaining node to follow the keyring without the removed one:",
		admin.RemovalStaged:    "waiting for each remaining node to acknowledge the fresh KEK:",
		admin.RemovalSettling:  "waiting for each remaining node to trust the fresh KEK:",
	} {
		r.Phase = phase
		renders(t, string(phase), func(w io.Writer) { Removal(w, r) }, append(append([]string{}, head...), first, "  node cp-1: slow",
			"these nodes still trust a KEK that the removed node knows: cp-1, cp-4",
			"not done yet: run kleidi node remove cp-2 --also cp-3 again, on any remaining node")...)
	}
}

// TestApproval: the command stands alone on its line, so that it can be copied. An
// approval without an end is a machine that was approved before.
func TestApproval(t *testing.T) {
	renders(t, "approved", func(w io.Writer) {
		Approval(w, admin.NodeApproval{Node: "cp-2", Command: "kleidi node join", Expires: at(5), Changes: []string{"one"}})
	}, "- one", "node cp-2 is approved until 2026-01-05 12:00:00; run this there, as root:", "", "kleidi node join")
	renders(t, "before", func(w io.Writer) { Approval(w, admin.NodeApproval{Command: "kleidi node join"}) }, "kleidi node join")
}

// TestJoined: a repeated join claims no new work.
func TestJoined(t *testing.T) {
	id := seal.ClusterID{1}
	r := members.JoinResult{Node: "cp-2", ClusterID: id, KeyID: "k1-a", Revision: 4, Files: []string{"/etc/a"}, Notes: []string{" see this\n"}}
	renders(t, "joined", func(w io.Writer) { Joined(w, &r) },
		"cluster ID     "+id.String(), "current key ID k1-a", "revision       4", "bootstrap file /etc/a", "note: see this", "sealed, tested, serve can start")
	r.Before = true
	renders(t, "again", func(w io.Writer) { Joined(w, &r) }, "node cp-2 has joined cluster "+id.String()+" already: the keyring of revision 4 opens here")
}

// TestIdentity: the PCRs of a machine to approve come in their order, with their bank.
func TestIdentity(t *testing.T) {
	renders(t, "identity", func(w io.Writer) {
		Identity(w, &members.Identity{Node: "cp-2", EK: "sha256:e", SRK: "sha256:s", EpochIndex: 0x1804b00, Boot: "uki", Bank: "sha256", PCRs: map[int]string{11: "bb", 4: "aa"}})
	}, "node           cp-2", "EK             sha256:e  (endorsement key)", "SRK            sha256:s  (storage root key)", "epoch index    0x01804b00", "boot           uki",
		"PCR 4          aa  (sha256)", "PCR 11         bb  (sha256)")
}

// TestReset: each forgotten file has a line, and each change in the TPM.
func TestReset(t *testing.T) {
	renders(t, "reset", func(w io.Writer) {
		Reset(w, &leaving.ResetResult{Removed: []string{"/k"}, Changes: []string{"epoch ended"}})
	}, "- removed /k", "- epoch ended")
}

// TestReceivers: a skipped slot receives no fresh KEK, and a change from outside is named.
func TestReceivers(t *testing.T) {
	r := admin.StatusReport{Slots: []admin.SlotReport{{Name: "tpm", Binding: "PCR 7"}, {Name: "vault", Binding: "transit"}}}
	renders(t, "inside", func(w io.Writer) { Receivers(w, r, []string{"vault"}) }, "the fresh KEK goes to:", "  tpm  PCR 7")
	r.ChangedOutside = []admin.OutsideChange{{Change: "added", Slot: "recovery age1x"}}
	renders(t, "outside", func(w io.Writer) { Receivers(w, r, nil) }, "the fresh KEK goes to:", "  tpm  PCR 7", "  vault  transit",
		"the keyring was changed from outside, and not by a command on this node:", "  added: recovery age1x")
}
