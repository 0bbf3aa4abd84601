package rollout

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/lifecycle"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

// GetInStep makes this node follow the cluster store, and returns its keyring. It refuses if
// several nodes have no cluster store in common.
func GetInStep(ctx context.Context, n *node.Node) (*keyring.Keyring, error) {
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return nil, err
	}
	const hint = "set cluster.kubeconfig on every node, the seat last, as docs/high-availability.md says"
	switch {
	case n.Replica == nil:
		return nil, seal.Errorf(seal.CauseConfiguration, hint, "the keyring has %d nodes, and this one has no access to the cluster store; nothing was changed", len(k.Nodes()))
	}
	if err := n.Replica.Sync(ctx); err != nil {
		return nil, err
	}
	if k, err = (cluster{n}).Keyring(ctx); err != nil {
		return nil, err
	}
	if k.Info().Commit != keyring.CommitCluster {
		return nil, seal.Errorf(seal.CauseConfiguration, hint, "the keyring has %d nodes, and node %s has not handed it over to the cluster store yet; nothing was changed", len(k.Nodes()), k.Info().Seat)
	}
	return k, nil
}

// driver returns the driver of a rotation from this node. shared wraps the fresh KEK in
// shared slots; it is nil if nothing is to be staged.
func driver(n *node.Node, shared func(context.Context, *keyring.Keyring) (rotation.Wrap, error)) *rotation.Driver {
	return &rotation.Driver{
		Cluster: cluster{n}, Memory: n.Memory,
		Wrap: func(ctx context.Context, k *keyring.Keyring, kek *seal.Secret, records []*keyring.VerifiedRecord) ([]seal.Slot, error) {
			wrap, err := shared(ctx, k)
			if err != nil {
				return nil, err
			}
			slots, err := wrap(ctx, kek)
			if err != nil {
				return nil, err
			}
			imports, err := wrapForAll(ctx, n, k, kek, records)
			return append(slots, imports...), err
		},
	}
}

// cluster implements rotation.Cluster.
type cluster struct{ node *node.Node }

// Keyring implements rotation.Cluster. A replica that is not in step says why.
func (c cluster) Keyring(context.Context) (*keyring.Keyring, error) {
	if s := c.node.Replica.State(); !s.InStep {
		return nil, notInStep(s)
	}
	return c.node.Unlocker.Keyring()
}

func notInStep(s replica.State) error {
	if s.Problem != nil {
		return fmt.Errorf("this node is not in step with the cluster store: %w", s.Problem)
	}
	return errors.New("this node has not read the cluster store yet; try again in a moment")
}

// Records implements rotation.Cluster.
func (c cluster) Records(ctx context.Context, k *keyring.Keyring) ([]*keyring.VerifiedRecord, error) {
	return c.node.Replica.Records(ctx, k)
}

// Change implements rotation.Cluster.
func (c cluster) Change(ctx context.Context, f func(*keyring.Keyring) ([]*keyring.Keyring, error)) error {
	return c.node.Unlocker.Change(ctx, f)
}

// gather bounds how long Start waits for records of the present keyring. A running node
// writes its own within moments of a change.
const gather = 10 * time.Second

// Options say how Start rotates.
type Options struct {
	// Shared wraps the fresh KEK in the slots that any node can open. If it is nil, the
	// KEK is wrapped like the present ones.
	Shared func(context.Context, *keyring.Keyring) (rotation.Wrap, error)
	// Replace is the key ID of the KEK to replace; "" means the current one.
	Replace seal.KeyID
}

// Start stages a fresh KEK in place of the current one. It returns once the KEK is staged
// or already replaced, or once it finds that the KEK can't be staged because nodes are
// missing. The running serve does the rest: see Drive.
func Start(ctx context.Context, n *node.Node, o Options) (*admin.Rotation, error) {
	k, err := GetInStep(ctx, n)
	if err != nil {
		return nil, err
	}
	if o.Replace == "" {
		o.Replace = k.CurrentID()
	}
	if o.Shared == nil {
		o.Shared = func(ctx context.Context, k *keyring.Keyring) (rotation.Wrap, error) {
			return lifecycle.WrapShared(ctx, n, k, admin.RotateRequest{})
		}
	}
	d := driver(n, o.Shared)
	limit := time.After(gather)
	for {
		round := n.Replica.Round()
		if k, err = d.Cluster.Keyring(ctx); err != nil {
			return nil, err
		}
		if s := k.Info().Staged; s != nil {
			return nil, alreadyStaged(s)
		}
		step, err := d.Advance(ctx, o.Replace)
		if err != nil {
			return nil, whoWon(ctx, n, err)
		}
		if step.Do != rotation.Wait {
			return Watch(ctx, n)
		}
		select {
		case <-round:
		case <-limit:
			r, err := Watch(ctx, n)
			if err == nil && r.StagedKeyID == "" {
				r.Phase = admin.RotationPreparing
			}
			return r, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// whoWon names another node's rotation, if that rotation is the reason for the failure.
func whoWon(ctx context.Context, n *node.Node, failed error) error {
	if err := n.Replica.Sync(ctx); err != nil {
		return failed
	}
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return failed
	}
	if s := k.Info().Staged; s != nil && !drives(k) {
		return alreadyStaged(s)
	}
	return failed
}

func alreadyStaged(s *keyring.KEKInfo) error {
	return seal.Errorf("", "watch it with kleidi rotate --continue, which takes it over from that node, or end it with kleidi rotate --abort",
		"another rotation is going on: %w", &keyring.AlreadyStaged{KeyID: s.KeyID, By: s.By, Since: s.Created})
}

// Continue makes this node drive the rotation that is going on.
func Continue(ctx context.Context, n *node.Node) (*admin.Rotation, error) {
	err := inStep(ctx, n, func(k *keyring.Keyring) (*keyring.Keyring, error) {
		if k.StagedID() == "" {
			return k, nil // the rotation is over, or settles without a driver
		}
		return keyring.TakeOver(k)
	})
	if err != nil {
		return nil, err
	}
	return Watch(ctx, n)
}

// Abort retires the staged KEK.
func Abort(ctx context.Context, n *node.Node) error {
	return inStep(ctx, n, func(k *keyring.Keyring) (*keyring.Keyring, error) { return k.Abort(time.Now()) })
}

// errNothing leaves a change without a new revision.
var errNothing = errors.New("nothing to change")

// inStep makes one revision on a node that is in step.
func inStep(ctx context.Context, n *node.Node, f func(*keyring.Keyring) (*keyring.Keyring, error)) error {
	if _, err := GetInStep(ctx, n); err != nil {
		return err
	}
	err := n.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := f(k)
		if err == nil && next == k {
			err = errNothing
		}
		return []*keyring.Keyring{next}, err
	})
	if errors.Is(err, errNothing) {
		return nil
	}
	return err
}

// Drive takes the steps of the rotations that this node drives, until ctx ends.
func Drive(ctx context.Context, n *node.Node) {
	d, logged := driver(n, nil), ""
	for ctx.Err() == nil {
		round := n.Replica.Round()
		if k, err := d.Cluster.Keyring(ctx); err == nil && drives(k) {
			step, err := d.Advance(ctx, "")
			if err == nil && step.Do == rotation.Wait {
				err = wrapAnew(ctx, n, k, step.Missing)
			}
			text := fmt.Sprint(step, err)
			switch {
			case ctx.Err() != nil || text == logged:
			case err != nil:
				n.Log.Error("rotation: the next step failed; it is tried again", "keyID", k.StagedID(), "cause", seal.CauseOf(err), "error", err)
			case step.Do == rotation.Wait:
				n.Log.Info("rotation: waiting for other nodes", "keyID", k.StagedID(), "missing", rotation.Describe(step.Missing))
			case step.Do == rotation.Activate:
				n.Log.Info("rotation: every node has the fresh KEK, which is current now", "keyID", k.StagedID())
			}
			logged = text
		}
		select {
		case <-ctx.Done():
		case <-round:
		}
	}
}

// drives reports whether the node of k drives a rotation.
func drives(k *keyring.Keyring) bool {
	self, ok := k.Self()
	staged := k.Info().Staged
	return ok && staged != nil && staged.By == self.Name
}
