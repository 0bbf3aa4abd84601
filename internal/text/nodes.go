package text

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/leaving"
	"github.com/beezy-dev/kleidi/internal/members"
)

// Reset prints what a machine has forgotten.
func Reset(w io.Writer, r *leaving.ResetResult) {
	for _, path := range r.Removed {
		fmt.Fprintf(w, "- removed %s\n", path)
	}
	for _, c := range r.Changes {
		fmt.Fprintf(w, "- %s\n", c)
	}
}

// Identity prints what an operator needs in order to approve a machine.
func Identity(w io.Writer, id *members.Identity) {
	row(w, "node", id.Node)
	row(w, "EK", id.EK+"  (endorsement key)")
	row(w, "SRK", id.SRK+"  (storage root key)")
	row(w, "epoch index", fmt.Sprintf("%#08x", id.EpochIndex))
	row(w, "boot", id.Boot)
	for _, i := range slices.Sorted(maps.Keys(id.PCRs)) {
		row(w, fmt.Sprintf("PCR %d", i), id.PCRs[i]+"  ("+id.Bank+")")
	}
}

// Removing says which nodes a removal waits for.
func Removing(r admin.NodeRemoval) string {
	text := map[admin.RemovalPhase]string{
		admin.RemovalFollowing: "waiting for each remaining node to follow the keyring without the removed one:",
		admin.RemovalStaged:    "waiting for each remaining node to acknowledge the fresh KEK:",
		admin.RemovalSettling:  "waiting for each remaining node to trust the fresh KEK:",
	}[r.Phase]
	for _, w := range r.Waiting {
		text += "\n  " + waiting(w)
	}
	if len(r.Trusting) > 0 {
		text += "\nthese nodes still trust a KEK that the removed node knows: " + strings.Join(r.Trusting, ", ")
	}
	return text
}

// Removal prints the progress of the removal of a node.
func Removal(w io.Writer, r admin.NodeRemoval) {
	for _, c := range r.Changes {
		fmt.Fprintf(w, "- %s\n", c)
	}
	row(w, "current key ID", string(r.CurrentKeyID))
	row(w, "revision", fmt.Sprint(r.Revision))
	if len(r.Nodes) == 0 { // only approvals were withdrawn
		return
	}
	fmt.Fprintln(w, "these ways into the keyring stay; a removed node may have added one of them:")
	for _, way := range r.WaysIn {
		fmt.Fprintf(w, "  %s\n", way)
	}
	if r.Phase == admin.RemovalDone {
		fmt.Fprintln(w, "done: every remaining node trusts only the fresh KEK, which no removed node has had")
		return
	}
	fmt.Fprintln(w, Removing(r))
	fmt.Fprintf(w, "not done yet: run kleidi node remove %s again, on any remaining node\n", strings.Join(r.Nodes, " --also "))
}

// Approval prints the command for an approved machine.
func Approval(w io.Writer, r admin.NodeApproval) {
	for _, c := range r.Changes {
		fmt.Fprintf(w, "- %s\n", c)
	}
	if !r.Expires.IsZero() {
		fmt.Fprintf(w, "node %s is approved until %s; run this there, as root:\n\n", r.Node, r.Expires.Local().Format(time.DateTime))
	}
	fmt.Fprintf(w, "%s\n", r.Command)
}

// Nodes prints the nodes of a cluster.
func Nodes(w io.Writer, l admin.NodeList) {
	row(w, "cluster ID", l.ClusterID)
	row(w, "current key ID", string(l.KeyID))
	row(w, "revision", fmt.Sprintf("%d (format %d)", l.Revision, l.Format))
	for _, n := range l.Nodes {
		var notes []string
		for note, is := range map[string]bool{"this one": n.Self, "seat": n.Seat, "has not finished joining": n.Unfinished, "no TPM": n.EK == ""} {
			if is {
				notes = append(notes, note)
			}
		}
		slices.Sort(notes)
		text := n.EK
		if len(notes) > 0 {
			text += " (" + strings.Join(notes, ", ") + ")"
		}
		if !n.Added.IsZero() {
			text += "  added " + n.Added.Local().Format(time.DateTime)
		}
		row(w, n.Node, strings.TrimSpace(text))
		record(w, n.Record)
	}
	for _, name := range l.Former {
		if slices.ContainsFunc(l.Nodes, func(n admin.NodeReport) bool { return n.Node == name }) {
			row(w, name, "replaced: the former machine of that name still knows the current KEK, until a rotation with kleidi rotate has ended")
		} else {
			row(w, name, "removed; it still knows the current KEK, until kleidi node remove "+name+" has ended")
		}
	}
	for _, a := range l.Approvals {
		if a.Expired {
			row(w, a.Node, "has not joined, and its approval has expired")
		} else {
			row(w, a.Node, "has not joined; approved until "+a.Until.Local().Format(time.DateTime)+", with EK "+a.EK)
		}
	}
	cluster(w, l.Cluster)
	if l.Stored {
		fmt.Fprintln(w, "kleidi serve does not run: this is the stored keyring, which nothing has verified")
	}
}

// Joined prints the result of a join.
func Joined(w io.Writer, r *members.JoinResult) {
	if r.Before {
		fmt.Fprintf(w, "node %s has joined cluster %s already: the keyring of revision %d opens here\n", r.Node, r.ClusterID, r.Revision)
		return
	}
	row(w, "cluster ID", r.ClusterID.String())
	row(w, "current key ID", string(r.KeyID))
	row(w, "revision", fmt.Sprint(r.Revision))
	for _, path := range r.Files {
		row(w, "bootstrap file", path)
	}
	for _, note := range r.Notes {
		fmt.Fprintf(w, "note: %s\n", strings.TrimSpace(note))
	}
	fmt.Fprintln(w, "sealed, tested, serve can start")
}
