package doctor

import (
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/doctor/credential"
	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
	"github.com/beezy-dev/kleidi/seal"
)

func clusterStore(n *Node) (all []diagnosis.Finding) {
	if n.Config.Cluster.Kubeconfig == "" {
		return nil
	}
	setup := "kleidi cluster setup --kubeconfig " + n.distribution().Kubeconfig
	if c := n.Status.Cluster; c != nil && c.Problem != nil {
		all = storeProblem(c, setup)
	} else if c == nil {
		all = diagnosis.NotChecked("the keyring is locked, so that this node does not know the cluster store")
	}
	if n.removed() {
		return all // a removed node must not get a certificate
	}
	c := n.Certificate.Value
	switch {
	case c == nil:
		all = append(all, diagnosis.NotChecked("the client certificate for the cluster store: %s", n.Certificate.Why)...)
	case c.Problem != "":
		all = append(all, diagnosis.Found("cluster-store/certificate", setup+"   # unless this node was removed", "%s: %s", c.File, c.Problem)...)
	case credential.Ending(n.Now, c.Ends, c.Lives):
		all = append(all, diagnosis.Found("cluster-store/certificate", "kubectl get csr   # approve the request of this node; or, unless this node was removed, "+setup, "%s ends at %s", c.File, c.Ends.UTC().Format(time.RFC3339))...)
	}
	return all
}

// storeProblem finds why this node is not in step with the cluster store, or can't write its
// record there. Its command is setup only if the store does not answer: on a removed node,
// setup would undo the removal, and it mends no keyring.
func storeProblem(c *admin.ClusterReport, setup string) []diagnosis.Finding {
	p := c.Problem
	what := "the cluster store: " + strings.TrimPrefix(told(p), "the cluster store: ")
	switch {
	case c.InStep:
		return diagnosis.Found("cluster-store/record", remedy(p, setup), "this node is in step with the cluster store, and can't write its record: %s", told(p))
	case p.Cause == seal.CauseNodeRemoved:
		return diagnosis.Found("cluster-store/removed", remedy(p, ""), "%s", what)
	case p.Cause == seal.CauseForked:
		return diagnosis.Found("cluster-store/forked", diagnosis.ForkedRemedy, "%s", what)
	case p.Cause == seal.CauseAnchor, p.Cause == seal.CauseKeyringCorrupt:
		return diagnosis.Found("cluster-store/refused", diagnosis.RefusedRemedy(p.Cause, p.Hint), "%s", what)
	}
	return diagnosis.Found("cluster-store/unreachable", remedy(p, setup), "%s", what)
}

// removed reports whether the shared keyring no longer lists this node.
func (n *Node) removed() bool {
	c := n.Status.Cluster
	return n.Status.Problem != nil && n.Status.Problem.Cause == seal.CauseNodeRemoved || c != nil && c.Problem != nil && c.Problem.Cause == seal.CauseNodeRemoved
}

func nodes(n *Node) (all []diagnosis.Finding) {
	if c := n.Status.Cluster; c != nil {
		for _, b := range c.Behind {
			all = append(all, diagnosis.Found("nodes/behind", "kleidi node list   # then kleidi doctor on "+b.Node, "node %s is behind: %s", b.Node, b.Why)...)
		}
	}
	l := n.Nodes.Value
	if l == nil {
		if n.Nodes.Why != "" {
			all = append(all, diagnosis.NotChecked("the other nodes: %s", n.Nodes.Why)...)
		}
		return all
	}
	for _, other := range l.Nodes {
		all = append(all, n.other(other)...)
	}
	return all
}

// other judges one node of the cluster.
func (n *Node) other(o admin.NodeReport) (all []diagnosis.Finding) {
	if o.Unfinished {
		all = diagnosis.Found("nodes/unfinished", "kleidi node approve "+o.Node+" --ek "+o.EK+"   # then the printed command there", "node %s was added at %s, and has not shown that it opened the keyring", o.Node, o.Added.UTC().Format(time.RFC3339))
	}
	if o.Self || o.Record == nil {
		return all
	}
	if o.Record.Problem != "" {
		all = append(all, diagnosis.Found("nodes/problem", "kleidi status   # on "+o.Node, "node %s: %s", o.Node, o.Record.Problem)...)
	}
	if n.Serving && o.Record.Version != n.Status.Version {
		all = append(all, diagnosis.Found("nodes/version", "kleidi version   # on "+o.Node, "node %s runs version %s, and this one %s", o.Node, o.Record.Version, n.Status.Version)...)
	}
	return all
}

func approvals(n *Node) (all []diagnosis.Finding) {
	l := n.Nodes.Value
	if l == nil {
		return nil // the check of the nodes says why
	}
	for _, a := range l.Approvals {
		if until := a.Until.UTC().Format(time.RFC3339); a.Expired {
			all = append(all, diagnosis.Found("approvals/expired", "kleidi node approve "+a.Node+" --ek "+a.EK, "the approval of node %s ended at %s, and it has not joined", a.Node, until)...)
		} else {
			all = append(all, diagnosis.Found("approvals/open", "systemctl restart kleidi   # forgets all approvals, if the node is not to join", "node %s is approved until %s, with the endorsement key %s", a.Node, until, a.EK)...)
		}
	}
	return all
}

// maxSkew is the largest difference between two clocks that is not a finding.
const maxSkew = 5 * time.Minute

const resync = "timedatectl set-ntp true   # and timedatectl timesync-status"

// clock compares this node's clock with the times in the keyring, and with the kernel's
// view of the clock.
func clock(n *Node) (all []diagnosis.Finding) {
	var latest time.Time
	for _, k := range n.Status.Keys {
		for _, t := range []time.Time{k.Created, k.Retired} {
			if t.After(latest) {
				latest = t
			}
		}
	}
	if latest.After(n.Now.Add(maxSkew)) {
		all = diagnosis.Found("clock/behind", resync, "it is %s here, and the keyring was changed at %s", n.Now.UTC().Format(time.RFC3339), latest.UTC().Format(time.RFC3339))
	}
	if l := n.Nodes.Value; l != nil {
		for _, o := range l.Nodes {
			if o.Record != nil && o.Record.Started.After(n.Now.Add(maxSkew)) {
				all = append(all, diagnosis.Found("clock/behind", resync, "node %s started at %s by its clock, and here it is %s", o.Node, o.Record.Started.UTC().Format(time.RFC3339), n.Now.UTC().Format(time.RFC3339))...)
			}
		}
	}
	switch {
	case n.Synchronised.Value == nil:
		all = append(all, diagnosis.NotChecked("the kernel does not tell whether the clock follows a time server: %s", n.Synchronised.Why)...)
	case !*n.Synchronised.Value:
		all = append(all, diagnosis.Found("clock/unsynchronised", resync, "the clock follows no time server")...)
	}
	return all
}
