package leaving

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/rollout"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

// Serve is what a removal needs of the serve that lets nodes join.
type Serve struct {
	// Audit writes records of the audit log.
	Audit func(...Record) error
	// Approved returns the names whose approval no machine has used. Forget ends the approval
	// of a name.
	Approved func() []string
	Forget   func(name string)
}

// Remove takes the next step of a removal, and reports the progress. The first step drops
// the nodes from the keyring, in one revision. Once every remaining node has followed
// that revision and written its record, Remove stages a fresh KEK, which the removed
// nodes don't know. The removal is over when every remaining node trusts that KEK alone.
// A name that was only approved loses its approval, and nothing else is due.
//
// The keyring names a removed node until another KEK is current, so any node can continue an
// interrupted removal. A failure of the audit log is reported, and does not hold a removal
// up: the removed node may be in wrong hands.
func Remove(ctx context.Context, n *node.Node, s Serve, req admin.RemoveNodesRequest) (admin.NodeRemoval, error) {
	r, err := remove(ctx, n, s, req)
	if err != nil {
		err = fmt.Errorf("remove: %w", err)
	}
	return r, err
}

func remove(ctx context.Context, n *node.Node, s Serve, req admin.RemoveNodesRequest) (r admin.NodeRemoval, err error) {
	k, err := inStep(ctx, n)
	if err != nil {
		if req.Begun {
			return r, unfinished(err, req.Nodes)
		}
		return r, withdraw(s, req.Nodes, err)
	}
	approved := s.Approved()
	known, err := known(k, approved, req.Nodes)
	if err != nil {
		return r, err
	}
	if !req.Begun {
		if err := refuseUnknown(ctx, n, known); err != nil {
			return r, err
		}
		r.Changes = known.doubt()
	}
	// A node that is listed later is a machine that has taken the place of a removed one.
	dropping := len(known.listed) > 0 && !req.Begun
	if dropping {
		if err := checkShared(n, k, known.listed); err != nil {
			return r, err
		}
	}
	if !req.Begun { // an approval that came later is for a machine that takes the node's place
		for _, name := range req.Nodes {
			s.Forget(name)
		}
		for _, name := range known.approved {
			r.Changes = append(r.Changes, "the approval of node "+name+" is withdrawn")
		}
		if len(known.approved) == len(req.Nodes) {
			r.Nodes, r.Phase, r.CurrentKeyID, r.Revision = []string{}, admin.RemovalDone, k.CurrentID(), k.Revision()
			return r, nil
		}
	}
	if dropping {
		listed := k.Nodes()
		changes, err := drop(ctx, n, known.listed)
		r.Changes = append(r.Changes, changes...)
		if err != nil {
			return r, err
		}
		if k, err = n.Unlocker.Keyring(); err != nil {
			return r, err
		}
		r.Changes = append(r.Changes, record(n, s.Audit, records(StepDropped, k, known.listed, listed))...)
	}
	if err = goOn(ctx, n, s, req, &r); err != nil {
		err = unfinished(err, req.Nodes)
	}
	return r, err
}

// unfinished says how a removal that has begun goes on after an error.
func unfinished(err error, names []string) error {
	return seal.AddHint(err, "the removal is not complete: once the cause is removed, run kleidi node remove "+strings.Join(names, " --also ")+" again")
}

// withdraw withdraws the approvals of these names, which needs no store, where the rest failed.
func withdraw(s Serve, names []string, failed error) error {
	approved := s.Approved()
	withdrawn := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return !slices.Contains(approved, name) })
	for _, name := range names {
		s.Forget(name)
	}
	if len(withdrawn) == 0 {
		return failed
	}
	return fmt.Errorf("the approval of %s is withdrawn, and nothing else was done: %w", nodesNamed(withdrawn), failed)
}

// goOn takes the next step after the nodes are dropped.
func goOn(ctx context.Context, n *node.Node, s Serve, req admin.RemoveNodesRequest, r *admin.NodeRemoval) error {
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return err
	}
	if staged := k.StagedID(); len(k.Info().Former) > 0 && staged != "" && !req.Begun {
		if _, err := rollout.Continue(ctx, n); err != nil { // the node that drove the rotation may be down
			return err
		}
	} else if ready, err := allFollow(ctx, n, k); err != nil {
		return err
	} else if len(k.Info().Former) > 0 && staged == "" && ready {
		state, err := rollout.Rotate(ctx, n, admin.RotateRequest{Replace: k.CurrentID(), SkipSlots: req.SkipSlots, AcceptDataLoss: req.AcceptDataLoss, Confirmed: req.Confirmed})
		if err != nil {
			return seal.AddHint(err, "the nodes are no longer in the keyring, and still know its KEK")
		}
		r.Changes = append(r.Changes, state.Changes...)
	}
	if err := describe(ctx, n, r); err != nil {
		return err
	}
	if r.Phase == admin.RemovalDone {
		if k, err = n.Unlocker.Keyring(); err != nil {
			return err
		}
		r.Changes = append(r.Changes, record(n, s.Audit, records(StepDone, k, req.Nodes, nil))...)
	}
	r.Nodes = req.Nodes
	return nil
}

func refuseUnknown(ctx context.Context, n *node.Node, all names) error {
	if len(all.unknown) == 0 {
		return nil
	}
	var r admin.NodeRemoval
	if err := describe(ctx, n, &r); err != nil {
		return err
	}
	return all.refuse(r.Phase == admin.RemovalSettling)
}

// inStep returns the keyring after this node has read the cluster store, if there is one.
func inStep(ctx context.Context, n *node.Node) (*keyring.Keyring, error) {
	if _, err := n.Unlocker.Keyring(); err != nil {
		return nil, err
	}
	if n.Replica != nil {
		if err := n.Replica.Sync(ctx); err != nil {
			return nil, err
		}
	}
	return n.Unlocker.Keyring()
}

// checkShared refuses a removal after which several nodes remain without a shared cluster
// store: their KEK could not be replaced.
func checkShared(n *node.Node, k *keyring.Keyring, leaving []string) error {
	if err := keyring.CheckSeat(k); err != nil {
		return err
	}
	if left := len(k.Nodes()) - len(leaving); left > 1 && (n.Replica == nil || k.Info().Commit != keyring.CommitCluster) {
		return seal.Errorf(seal.CauseConfiguration, "set up the cluster store first, as docs/high-availability.md says; or remove all other nodes at once, with --also NAME for each",
			"%d nodes would remain, which share no cluster store, so their KEK could not be replaced, and the removed node knows it; nothing was changed", left)
	}
	return nil
}

// drop removes nodes from the keyring, in one revision. They may know a staged KEK as well, so
// drop retires it first.
func drop(ctx context.Context, n *node.Node, leaving []string) (changes []string, err error) {
	err = n.Unlocker.Change(ctx, func(k *keyring.Keyring) (revisions []*keyring.Keyring, err error) {
		defer func() {
			if err != nil {
				for _, next := range revisions {
					next.Close()
				}
			}
		}()
		if id := k.StagedID(); id != "" {
			if !k.Holds(id) {
				return nil, fmt.Errorf("the staged KEK %s is not open here, and the node may know it; run the command on a node where it is open", id)
			}
			if k, err = k.Abort(time.Now()); err != nil {
				return nil, err
			}
			revisions = append(revisions, k)
			changes = append(changes, "the rotation that was going on is aborted: the node may know its KEK "+string(id))
		}
		next, err := k.WithoutNode(leaving...)
		if err != nil {
			return revisions, err
		}
		changes = append(changes, fmt.Sprintf("%s no longer in the keyring (revision %d)", areNodes(leaving), next.Revision()))
		return append(revisions, next), nil
	})
	return changes, err
}

// allFollow reports whether every node has followed the present keyring, so that a KEK can be
// staged for all.
func allFollow(ctx context.Context, n *node.Node, k *keyring.Keyring) (bool, error) {
	if len(k.Nodes()) == 1 || n.Replica == nil {
		return true, nil
	}
	records, err := n.Replica.Records(ctx, k)
	return rotation.Next(k, k.CurrentID(), records).Do == rotation.Stage, err
}

// describe fills in the progress of a removal, from the keyring and the records.
func describe(ctx context.Context, n *node.Node, r *admin.NodeRemoval) error {
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return err
	}
	r.CurrentKeyID, r.Revision, r.Former = k.CurrentID(), k.Revision(), k.Info().Former
	var records []*keyring.VerifiedRecord
	watched := &admin.Rotation{Phase: admin.RotationDone}
	if n.Replica != nil && k.Info().Commit == keyring.CommitCluster {
		if watched, err = rollout.Watch(ctx, n); err != nil {
			return err
		}
		if records, err = n.Replica.Records(ctx, k); err != nil {
			return err
		}
	}
	r.Phase, r.Waiting = phase(k, watched), watched.Waiting
	r.Trusting = trusting(k, r)
	r.WaysIn = waysIn(n, k, records)
	return nil
}

func phase(k *keyring.Keyring, r *admin.Rotation) admin.RemovalPhase {
	switch {
	case k.StagedID() != "":
		return admin.RemovalStaged
	case len(k.Info().Former) > 0:
		return admin.RemovalFollowing
	case r.Phase != admin.RotationDone:
		return admin.RemovalSettling
	}
	return admin.RemovalDone
}

// trusting returns the nodes that still accept a keyring under a KEK that a removed node knows.
func trusting(k *keyring.Keyring, r *admin.NodeRemoval) (names []string) {
	for _, n := range k.Nodes() {
		if len(r.Former) > 0 || slices.ContainsFunc(r.Waiting, func(w admin.WaitingNode) bool { return w.Node == n.Name }) {
			names = append(names, n.Name)
		}
	}
	return names
}

// waysIn lists the slots that open the keyring. A former node may have added one of them, and
// a rotation wraps the fresh KEK for all of them.
func waysIn(n *node.Node, k *keyring.Keyring, records []*keyring.VerifiedRecord) (ways []string) {
	self, _ := k.Self()
	for _, other := range k.Nodes() {
		way := "node " + other.Name + ": no TPM"
		if other.EK != "" {
			way = "node " + other.Name + ": TPM with endorsement key " + other.EK
		}
		i := slices.IndexFunc(records, func(r *keyring.VerifiedRecord) bool { return r.Node == other.Name })
		if other.Name != self.Name && i >= 0 && len(records[i].BootStates) > 0 {
			way += ", " + describeStates(records[i].BootStates)
		}
		ways = append(ways, way)
	}
	names := slotview.Names(k.Slots())
	for i, s := range k.Slots() {
		if s.Type != seal.TypeUnrevoked {
			ways = append(ways, "slot "+names[i]+": "+n.View.Binding(s))
		}
	}
	return ways
}

func describeStates(states []keyring.RecordedState) string {
	text := seal.Count(len(states), "boot state")
	var notes []string
	for _, s := range states {
		if s.Use != "" && s.Use != "present" && !slices.Contains(notes, s.Use) {
			notes = append(notes, s.Use)
		}
		if s.Signer != nil && !slices.Contains(notes, "signed") {
			notes = append(notes, "signed")
		}
	}
	if len(notes) > 0 {
		text += " (also: " + strings.Join(notes, ", ") + ")"
	}
	return text
}
