package rollout

import (
	"context"
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/lifecycle"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

// Rotate rotates the KEK of one node, or makes the running serve rotate the KEK of
// several nodes.
func Rotate(ctx context.Context, n *node.Node, req admin.RotateRequest) (admin.KeyringState, error) {
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("rotate: %w", err)
	}
	if len(k.Nodes()) > 1 {
		return rotateSeveral(ctx, n, k.CurrentID(), req)
	}
	return RotateAlone(ctx, n, req)
}

// RotateAlone rotates the KEK of one node, and refuses a keyring of several nodes, whose
// rotation takes as long as the slowest node needs.
func RotateAlone(ctx context.Context, n *node.Node, req admin.RotateRequest) (admin.KeyringState, error) {
	k, err := n.Unlocker.Keyring()
	switch {
	case err != nil:
		return admin.KeyringState{}, fmt.Errorf("rotate: %w", err)
	case len(k.Nodes()) == 1 && (req.Continue || req.Abort):
		return admin.KeyringState{}, errors.New("rotate: this keyring has one node, so a rotation ends with its command: there is none to continue or abort")
	}
	if len(k.Nodes()) == 1 && req.Replace != "" && req.Replace != k.CurrentID() { // a repetition after another rotation
		return n.Result(req.Replace)
	}
	return lifecycle.Rotate(ctx, n, req)
}

// rotateSeveral stages a fresh KEK for several nodes, or takes over or aborts the rotation
// that is going on.
func rotateSeveral(ctx context.Context, n *node.Node, before seal.KeyID, req admin.RotateRequest) (admin.KeyringState, error) {
	var r *admin.Rotation
	var notes []string
	err := error(nil)
	switch {
	case req.Abort:
		notes = []string{"the rotation is aborted; its KEK is retired, and nothing is encrypted under it"}
		err = Abort(ctx, n)
	case req.Continue:
		r, err = Continue(ctx, n)
		if err == nil && r.Phase == admin.RotationDone {
			notes = []string{"no rotation is going on"}
		}
	default:
		r, err = confirmAndStart(ctx, n, req)
		if k, openErr := n.Unlocker.Keyring(); openErr == nil {
			notes = append(notes, slotview.ReportRoom(k)...)
		}
	}
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("rotate: %w", err)
	}
	return withRotation(n, before, r, notes...)
}

func confirmAndStart(ctx context.Context, n *node.Node, req admin.RotateRequest) (*admin.Rotation, error) {
	k, err := GetInStep(ctx, n)
	if err != nil {
		return nil, err
	}
	if err := lifecycle.CheckConfirmed(ctx, n, k, req.Confirmed); err != nil {
		return nil, err
	}
	return Start(ctx, n, Options{Replace: req.Replace, Shared: func(ctx context.Context, k *keyring.Keyring) (rotation.Wrap, error) {
		return lifecycle.WrapShared(ctx, n, k, req)
	}})
}

// WatchRotation reports the progress of a rotation of several nodes.
func WatchRotation(ctx context.Context, n *node.Node, _ admin.WatchRotationRequest) (admin.KeyringState, error) {
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return admin.KeyringState{}, err
	}
	r, err := Watch(ctx, n)
	if err != nil {
		return admin.KeyringState{}, err
	}
	return withRotation(n, k.CurrentID(), r)
}

func withRotation(n *node.Node, before seal.KeyID, r *admin.Rotation, notes ...string) (admin.KeyringState, error) {
	s, err := n.Result(before, notes...)
	s.Rotation = r
	return s, err
}
