package rollout

import (
	"context"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

// readWithin bounds a report's read of the cluster store. If the store does not answer,
// the report comes from memory.
const readWithin = 3 * time.Second

// Watch reports the progress of the rotation.
func Watch(ctx context.Context, n *node.Node) (*admin.Rotation, error) {
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return nil, err
	}
	if n.Replica == nil {
		return &admin.Rotation{Phase: admin.RotationDone}, nil
	}
	reports, err := n.Replica.Reports(ctx)
	if err != nil {
		return nil, err
	}
	return describe(k, reports), nil
}

// Cluster reports this node's knowledge of the other nodes, from memory. It is nil if
// this node shares nothing with them.
func Cluster(n *node.Node, k *keyring.Keyring) *admin.ClusterReport {
	if n.Replica == nil || k.Format() == 1 {
		return nil
	}
	return report(n.Replica.State(), k)
}

func report(s replica.State, k *keyring.Keyring) *admin.ClusterReport {
	r := &admin.ClusterReport{InStep: s.InStep, Reached: s.Reached, Revision: s.Revision, Problem: admin.ProblemOf(s.Problem), Rotation: describe(k, s.Reports)}
	switch seal.CauseOf(s.Problem) {
	case seal.CauseAnchor, seal.CauseForked, seal.CauseNodeRemoved:
		// The others have another keyring than this node, whose records this node can't verify.
	default:
		r.Behind = Behind(k, s.Reports)
	}
	return r
}

// Records returns the last record of each node of k, read now if the store answers.
func Records(ctx context.Context, n *node.Node, k *keyring.Keyring) map[string]*admin.NodeRecord {
	if n.Replica == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, readWithin)
	defer cancel()
	reports, err := n.Replica.Reports(ctx)
	if err != nil {
		reports = n.Replica.State().Reports
	}
	all := map[string]*admin.NodeRecord{}
	for _, r := range ofThisLife(k, reports) {
		if v := r.Record; v != nil {
			all[r.Node] = &admin.NodeRecord{Revision: v.Revision, Anchored: v.Anchored, Announced: v.Announced, Encrypted: v.Encrypted, Acknowledged: v.Acknowledged,
				Formats: v.Formats, Version: v.Version, BootStates: len(v.BootStates), Problem: v.Problem, Started: v.Started}
		}
	}
	for _, w := range Behind(k, reports) {
		if r := all[w.Node]; r != nil {
			r.Behind = w.Why
		}
	}
	return all
}

// Behind returns the nodes that have not followed the present keyring.
func Behind(k *keyring.Keyring, reports []replica.Report) []admin.WaitingNode {
	return waiting(rotation.Behind(k, counting(reports)), ofThisLife(k, reports), rotation.WhyNotFollowed)
}

// Encrypting returns the nodes whose kube-apiserver may still encrypt under a KEK other than
// the current one.
func Encrypting(k *keyring.Keyring, reports []replica.Report) []admin.WaitingNode {
	return waiting(rotation.Encrypting(k, counting(reports)), ofThisLife(k, reports), rotation.WhyNotFollowed)
}

func counting(reports []replica.Report) (all []*keyring.VerifiedRecord) {
	for _, r := range reports {
		if r.Counts {
			all = append(all, r.Record)
		}
	}
	return all
}

// ofThisLife returns the reports without what a node said before it was removed and joined
// again: "run kleidi reset" is no advice for the machine that has joined. It reads the clocks
// of two machines, so it is for display only.
func ofThisLife(k *keyring.Keyring, reports []replica.Report) []replica.Report {
	all := slices.Clone(reports)
	for _, n := range k.Nodes() {
		for i, r := range all {
			if r.Node == n.Name && r.Record != nil && !r.Counts && r.Record.Started.Before(n.Added) {
				silent := *r.Record
				silent.Problem = ""
				all[i].Record = &silent
			}
		}
	}
	return all
}

// describe says which nodes a rotation waits for, and why.
func describe(k *keyring.Keyring, reports []replica.Report) *admin.Rotation {
	step := rotation.Next(k, "", counting(reports))
	r, older := &admin.Rotation{Phase: admin.RotationDone}, rotation.WhyNotFollowed
	if s := k.Info().Staged; s != nil {
		r.Phase, r.StagedKeyID, r.By, r.Since = admin.RotationStaged, s.KeyID, s.By, s.Created
		older = rotation.WhyNotAcknowledged
	} else if step.Do != rotation.Settled {
		r.Phase = admin.RotationSettling
	}
	r.Waiting = waiting(step.Missing, ofThisLife(k, reports), older)
	return r
}

// waiting adds the last record of each missing node. A record from before the present
// keyring counts as none, and the reason then says so.
func waiting(missing []rotation.Missing, reports []replica.Report, older rotation.Why) (all []admin.WaitingNode) {
	for _, m := range missing {
		w := admin.WaitingNode{Node: m.Node, Why: string(m.Why)}
		for _, r := range reports {
			if r.Node != m.Node || r.Record == nil {
				continue
			}
			if m.Why == rotation.WhyNoRecord {
				w.Why = string(older)
			}
			w.Revision, w.Version, w.Problem = r.Record.Revision, r.Record.Version, r.Record.Problem
		}
		all = append(all, w)
	}
	return all
}

// StoreUp reports whether the cluster store answered at the last read.
func StoreUp(s replica.State) bool {
	return !s.Reached.IsZero() && !s.Away
}

// Forked reports whether the store's keyring and this node's are a fork.
func Forked(s replica.State) bool { return seal.CauseOf(s.Problem) == seal.CauseForked }
