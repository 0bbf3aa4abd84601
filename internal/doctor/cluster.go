package doctor

import (
	"crypto/x509"
	"encoding/pem"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
)

// leastCertificate is the remaining lifetime below which a client certificate is a
// finding. kleidi asks for the next certificate a month before the end, so an
// administrator has had weeks to approve it.
const leastCertificate = 14 * 24 * time.Hour

func clusterStore(n *Node) (all []Finding) {
	if n.Config.Cluster.Kubeconfig == "" {
		return nil
	}
	const setup = "kleidi cluster setup --kubeconfig /etc/kubernetes/admin.conf"
	if c := n.Status.Cluster; c != nil && c.Problem != nil && c.InStep {
		all = found("cluster-store/record", remedy(c.Problem, setup), "this node is in step with the cluster store, and can't write its record: %s", told(c.Problem))
	} else if c != nil && c.Problem != nil {
		all = found("cluster-store/unreachable", remedy(c.Problem, setup), "the cluster store: %s", strings.TrimPrefix(told(c.Problem), "the cluster store: "))
	} else if c == nil {
		all = notChecked("the keyring is locked, so that this node does not know the cluster store")
	}
	c := n.Certificate.Value
	switch {
	case c == nil:
		all = append(all, notChecked("the client certificate for the cluster store: %s", n.Certificate.Why)...)
	case c.Problem != "":
		all = append(all, found("cluster-store/certificate", setup, "%s: %s", c.File, c.Problem)...)
	case c.Ends.Sub(n.Now) < min(leastCertificate, c.Lives/6):
		all = append(all, found("cluster-store/certificate", "kubectl get csr   # approve the request of this node; or "+setup, "%s ends at %s", c.File, c.Ends.UTC().Format(time.RFC3339))...)
	}
	return all
}

func nodes(n *Node) (all []Finding) {
	if c := n.Status.Cluster; c != nil {
		for _, b := range c.Behind {
			all = append(all, found("nodes/behind", "kleidi node list   # then kleidi doctor on "+b.Node, "node %s is behind: %s", b.Node, b.Why)...)
		}
	}
	l := n.Nodes.Value
	if l == nil {
		if n.Nodes.Why != "" {
			all = append(all, notChecked("the other nodes: %s", n.Nodes.Why)...)
		}
		return all
	}
	for _, other := range l.Nodes {
		all = append(all, n.other(other)...)
	}
	return all
}

// other judges one node of the cluster.
func (n *Node) other(o admin.NodeReport) (all []Finding) {
	if o.Unfinished {
		all = found("nodes/unfinished", "kleidi node approve "+o.Node+" --ek "+o.EK+"   # then the printed command there", "node %s was added at %s, and has not shown that it opened the keyring", o.Node, o.Added.UTC().Format(time.RFC3339))
	}
	if o.Self || o.Record == nil {
		return all
	}
	if o.Record.Problem != "" {
		all = append(all, found("nodes/problem", "kleidi status   # on "+o.Node, "node %s: %s", o.Node, o.Record.Problem)...)
	}
	if n.Serving && o.Record.Version != n.Status.Version {
		all = append(all, found("nodes/version", "kleidi version   # on "+o.Node, "node %s runs version %s, and this one %s", o.Node, o.Record.Version, n.Status.Version)...)
	}
	return all
}

func approvals(n *Node) (all []Finding) {
	l := n.Nodes.Value
	if l == nil {
		return nil // the check of the nodes says why
	}
	for _, a := range l.Approvals {
		if until := a.Until.UTC().Format(time.RFC3339); a.Expired {
			all = append(all, found("approvals/expired", "kleidi node approve "+a.Node+" --ek "+a.EK, "the approval of node %s ended at %s, and it has not joined", a.Node, until)...)
		} else {
			all = append(all, found("approvals/open", "systemctl restart kleidi   # forgets all approvals, if the node is not to join", "node %s is approved until %s, with the endorsement key %s", a.Node, until, a.EK)...)
		}
	}
	return all
}

// vaultCertificate judges the certificate with which kleidi logs in to Vault.
func vaultCertificate(n *Node) []Finding {
	file := n.Config.Vault.Auth.CertFile
	if file == "" {
		return nil
	}
	b, err := n.read(file)
	if err != nil {
		return notChecked("%v", err)
	}
	remedy := "kleidi slot test vault   # after a fresh certificate is in " + file
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return found("vault/certificate", remedy, "%s begins with no certificate in PEM", file)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return found("vault/certificate", remedy, "%s: %v", file, err)
	}
	if c.NotAfter.Sub(n.Now) < min(leastCertificate, c.NotAfter.Sub(c.NotBefore)/6) {
		return found("vault/certificate", remedy, "%s ends at %s", file, c.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// maxSkew is the largest difference between two clocks that is not a finding.
const maxSkew = 5 * time.Minute

const resync = "timedatectl set-ntp true   # and timedatectl timesync-status"

// clock compares this node's clock with the times in the keyring, and with the kernel's
// view of the clock.
func clock(n *Node) (all []Finding) {
	var latest time.Time
	for _, k := range n.Status.Keys {
		for _, t := range []time.Time{k.Created, k.Retired} {
			if t.After(latest) {
				latest = t
			}
		}
	}
	if latest.After(n.Now.Add(maxSkew)) {
		all = found("clock/behind", resync, "it is %s here, and the keyring was changed at %s", n.Now.UTC().Format(time.RFC3339), latest.UTC().Format(time.RFC3339))
	}
	if l := n.Nodes.Value; l != nil {
		for _, o := range l.Nodes {
			if o.Record != nil && o.Record.Started.After(n.Now.Add(maxSkew)) {
				all = append(all, found("clock/behind", resync, "node %s started at %s by its clock, and here it is %s", o.Node, o.Record.Started.UTC().Format(time.RFC3339), n.Now.UTC().Format(time.RFC3339))...)
			}
		}
	}
	switch {
	case n.Synchronised.Value == nil:
		all = append(all, notChecked("the kernel does not tell whether the clock follows a time server: %s", n.Synchronised.Why)...)
	case !*n.Synchronised.Value:
		all = append(all, found("clock/unsynchronised", resync, "the clock follows no time server")...)
	}
	return all
}
