package text

import (
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
)

// Progress says which nodes a rotation waits for.
func Progress(r *admin.Rotation) string {
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
		text += "\n  " + waiting(n)
	}
	return text
}

func waiting(n admin.WaitingNode) string {
	text := "node " + n.Node + ": " + n.Why
	if n.Problem != "" {
		text += "; it says: " + n.Problem
	}
	return text
}

// Rotation prints the progress of a rotation over several nodes.
func Rotation(w io.Writer, s admin.KeyringState) {
	State(w, s)
	r := s.Rotation
	if r.StagedKeyID != "" {
		fmt.Fprintf(w, "staged key ID   %s\nstaged by       node %s, %s\n", r.StagedKeyID, r.By, r.Since.Local().Format(time.DateTime))
	}
	if r.Phase == admin.RotationDone {
		return
	}
	fmt.Fprintln(w, Progress(r))
	if r.Phase == admin.RotationPreparing {
		fmt.Fprintln(w, "nothing was changed; run kleidi rotate again when they have")
		return
	}
	fmt.Fprintln(w, "kleidi serve goes on with it; watch it with kleidi rotate --continue --wait")
}

// Receivers prints the slots that receive a fresh KEK, and the changes of the keyring that
// no command on this node made. skipped are the names of slots that receive none.
func Receivers(w io.Writer, r admin.StatusReport, skipped []string) {
	fmt.Fprintln(w, "the fresh KEK goes to:")
	for _, s := range r.Slots {
		if !slices.Contains(skipped, s.Name) {
			fmt.Fprintf(w, "  %s  %s\n", s.Name, s.Binding)
		}
	}
	if len(r.ChangedOutside) > 0 {
		fmt.Fprintln(w, "the keyring was changed from outside, and not by a command on this node:")
	}
	for _, c := range r.ChangedOutside {
		fmt.Fprintf(w, "  %s: %s\n", c.Change, c.Slot)
	}
}

// cluster prints a node's knowledge of the cluster store.
func cluster(w io.Writer, c *admin.ClusterReport) {
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
	problem(w, c.Problem)
	for _, n := range c.Behind {
		row(w, "BEHIND", waiting(n))
	}
	r := c.Rotation
	if r == nil || r.StagedKeyID == "" {
		return
	}
	row(w, "ROTATION", fmt.Sprintf("node %s staged key ID %s, %s", r.By, r.StagedKeyID, r.Since.Local().Format(time.DateTime)))
	for _, n := range r.Waiting {
		row(w, "waiting for", waiting(n))
	}
}

// record prints a node's last record in the cluster store.
func record(w io.Writer, r *admin.NodeRecord) {
	if r == nil {
		return
	}
	fmt.Fprintf(w, "  revision %d, anchored and announced %s, kleidi %s (formats %v), %s, started %s\n",
		r.Revision, r.Announced, r.Version, r.Formats, seal.Count(r.BootStates, "boot state"), r.Started.Local().Format(time.DateTime))
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
