package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/seal"
)

// watchOptions say how long to watch a rotation of several nodes.
type watchOptions struct {
	wait    bool
	timeout time.Duration
}

// exitWaiting is the exit code of a rotation that waits for nodes.
const exitWaiting = 3

// watchEvery is how often the running serve, which has the progress in memory, is asked.
const watchEvery = 250 * time.Millisecond

// watchRotation shows the progress of a rotation of several nodes, and its result.
func watchRotation(cmd *cobra.Command, a *app, o watchOptions, req admin.RotateRequest, s admin.KeyringState) error {
	ctx := cmd.Context()
	if o.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.timeout)
		defer cancel()
	}
	replaced := s.CurrentKeyID
	if s.Former != "" {
		replaced = s.Former
	}
	fresh, said := s.Rotation.StagedKeyID, ""
	for o.wait && s.Rotation.Phase != admin.RotationDone && ctx.Err() == nil {
		if text := describeProgress(s.Rotation); text != said {
			fmt.Fprintln(cmd.ErrOrStderr(), text)
			said = text
		}
		select {
		case <-ctx.Done():
			continue
		case <-time.After(watchEvery):
		}
		var next admin.KeyringState
		var err error
		if fresh == "" && s.CurrentKeyID == replaced && !req.Continue && !req.Abort { // nothing is staged yet
			req.Replace = replaced
			next, err = operate(ctx, a, operation.Rotate, req)
		} else {
			next, err = operate(ctx, a, operation.WatchRotation, admin.WatchRotationRequest{})
		}
		if err != nil {
			if ctx.Err() != nil {
				break
			}
			return err
		}
		s = next
		if fresh == "" {
			fresh = s.Rotation.StagedKeyID
		}
	}
	if s.CurrentKeyID != replaced {
		s.Former = replaced
	}
	if err := a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printRotation(w, s) }); err != nil {
		return err
	}
	switch {
	case s.Rotation.Phase != admin.RotationDone:
		return &exitError{code: exitWaiting}
	case fresh != "" && s.CurrentKeyID != fresh && !req.Abort:
		return &seal.Error{Err: errors.New("the rotation was aborted, or replaced by another one"), Hint: "see kleidi keyring show"}
	}
	return nil
}

func describeProgress(r *admin.Rotation) string {
	text := "waiting for each node to acknowledge the fresh KEK:"
	switch {
	case r.Phase == admin.RotationPreparing:
		text = "nothing is staged before each node has followed the present keyring:"
	case r.Phase == admin.RotationSettling:
		text = "waiting for each node to announce the current KEK:"
	case len(r.Waiting) == 0:
		text = "every node has acknowledged the fresh KEK, which becomes current"
	}
	for _, n := range r.Waiting {
		text += "\n  " + describeWaiting(n)
	}
	return text
}

func describeWaiting(n admin.WaitingNode) string {
	text := "node " + n.Node + ": " + n.Why
	if n.Problem != "" {
		text += "; it says: " + n.Problem
	}
	return text
}

func printRotation(w io.Writer, s admin.KeyringState) {
	printState(w, s)
	r := s.Rotation
	if r.StagedKeyID != "" {
		fmt.Fprintf(w, "staged key ID   %s\nstaged by       node %s, %s\n", r.StagedKeyID, r.By, r.Since.Local().Format(time.DateTime))
	}
	if r.Phase == admin.RotationDone {
		return
	}
	fmt.Fprintln(w, describeProgress(r))
	if r.Phase == admin.RotationPreparing {
		fmt.Fprintln(w, "nothing was changed; run kleidi rotate again when they have")
		return
	}
	fmt.Fprintln(w, "kleidi serve goes on with it; watch it with kleidi rotate --continue --wait")
}

// printCluster shows what a node knows of the cluster store.
func printCluster(w io.Writer, c *admin.ClusterReport) {
	if c == nil {
		return
	}
	step := "in step"
	if !c.InStep {
		step = "not in step"
	}
	if c.Reached.IsZero() {
		step += ", never read"
	} else {
		step += fmt.Sprintf(", read %s, revision %d", c.Reached.Local().Format(time.DateTime), c.Revision)
	}
	row(w, "cluster store", step)
	printProblem(w, c.Problem)
	for _, n := range c.Behind {
		row(w, "BEHIND", describeWaiting(n))
	}
	r := c.Rotation
	if r == nil || r.StagedKeyID == "" {
		return
	}
	row(w, "ROTATION", fmt.Sprintf("node %s staged key ID %s, %s", r.By, r.StagedKeyID, r.Since.Local().Format(time.DateTime)))
	for _, n := range r.Waiting {
		row(w, "waiting for", describeWaiting(n))
	}
}

// printRecord shows what a node last said of itself in the cluster store.
func printRecord(w io.Writer, r *admin.NodeRecord) {
	if r == nil {
		return
	}
	fmt.Fprintf(w, "  revision %d, anchored and announced %s, kleidi %s (formats %v), %d boot states, started %s\n",
		r.Revision, r.Announced, r.Version, r.Formats, r.BootStates, r.Started.Local().Format(time.DateTime))
	if r.Anchored != r.Announced {
		fmt.Fprintf(w, "  anchored %s\n", r.Anchored)
	}
	if r.Encrypted != "" && r.Encrypted != r.Announced {
		fmt.Fprintf(w, "  kube-apiserver last encrypted under %s\n", r.Encrypted)
	}
	if r.Acknowledged != "" {
		fmt.Fprintf(w, "  acknowledged %s\n", r.Acknowledged)
	}
	if r.Behind != "" {
		fmt.Fprintf(w, "  %s\n", r.Behind)
	}
	if r.Problem != "" {
		fmt.Fprintf(w, "  it says: %s\n", r.Problem)
	}
}
