package members

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/grpcserver/join"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/leaving"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/rollout"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest/joinproof"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
)

// Bounds of an approval's time.
const (
	DefaultExpiry = time.Hour
	MaxExpiry     = 24 * time.Hour
)

// Approve lets a node join once, and returns the command for it.
func (d *Desk) Approve(ctx context.Context, req admin.ApproveNodeRequest) (admin.NodeApproval, error) {
	r, err := d.approve(ctx, req)
	if err != nil {
		err = fmt.Errorf("approve: %w", err)
	}
	return r, err
}

func (d *Desk) approve(ctx context.Context, req admin.ApproveNodeRequest) (r admin.NodeApproval, err error) {
	k, err := d.node.Unlocker.Keyring()
	if err != nil {
		return r, err
	}
	if err := checkApproval(k, req); err != nil {
		return r, err
	}
	if req.NoTPM {
		return d.listWithoutTPM(ctx, req)
	}
	address, err := d.address()
	if err != nil {
		return r, err
	}
	a, err := d.approval(k, req)
	if err != nil {
		return r, err
	}
	upgraded, err := d.upgrade(ctx)
	if err != nil {
		return r, err
	}
	if upgraded {
		r.Changes = append(r.Changes, upgradedNote)
	}
	if a.Files, err = d.lock(req.Files); err != nil {
		return r, err
	}
	if err := d.server.Approve(a); err != nil {
		closeFiles(a.Files)
		return r, err
	}
	if k, err = d.node.Unlocker.Keyring(); err != nil {
		return r, err
	}
	r.Node, r.Address, r.Certificate, r.Trust, r.Expires = req.Node, address, d.server.Certificate(), k.Anchor().Trust(), time.Now().Add(a.Expires)
	r.Command = fmt.Sprintf("kleidi join %s --node %s --verifier %s --trust %s", address, req.Node, r.Certificate, r.Trust)
	d.node.Log.Info("a node is approved to join", "node", req.Node, "ek", req.EK, "expires", a.Expires)
	return r, nil
}

const upgradedNote = "the keyring is written in format 2 from now on, which several nodes share; earlier versions of kleidi can't read it"

// listWithoutTPM lists a node that has no TPM, and so can prove nothing. The node
// opens the keyring with a token, a server or a KMS plugin that all nodes share, and the
// operator carries the keyring there.
func (d *Desk) listWithoutTPM(ctx context.Context, req admin.ApproveNodeRequest) (r admin.NodeApproval, err error) {
	if len(req.Files) > 0 || len(req.BootPolicy) > 0 {
		return r, errors.New("--no-tpm: a machine without a TPM proves nothing, so no boot policy judges it and no bootstrap file is handed over")
	}
	slots := d.node.OpenSlots()
	if !slices.ContainsFunc(slots, func(s seal.Slot) bool { return slotview.IsSecondary(s.Type) }) {
		return r, errors.New("--no-tpm: no slot belongs to a token or a server, so such a machine could open nothing; run kleidi slot add pkcs11, kleidi slot add vault or kleidi slot add kms-plugin first")
	}
	upgraded, err := d.upgrade(ctx)
	if err != nil {
		return r, err
	}
	if upgraded {
		r.Changes = append(r.Changes, upgradedNote)
	}
	err = d.reviser.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) { return withoutTPM(k, req) })
	if err != nil && !errors.Is(err, errNothing) {
		return r, err
	}
	k, err := d.node.Unlocker.Keyring()
	if err != nil {
		return r, err
	}
	v := &join.Verdict{Time: time.Now().UTC(), Node: req.Node, Accepted: true, Join: &join.Step{Step: join.StepListed, KeyID: k.CurrentID(), Revision: k.Revision()}}
	if err := d.record(v); err != nil {
		return r, fmt.Errorf("audit.file: %w; node %s is listed, and its command is printed once that is on record: run the command again", err, req.Node)
	}
	r.Node, r.Trust = req.Node, k.Anchor().Trust()
	r.Changes = append(r.Changes, "node "+req.Node+" is listed; copy the result of kleidi keyring backup FILE to it, then run this there")
	r.Command = fmt.Sprintf("kleidi join --keyring FILE --node %s --trust %s", req.Node, r.Trust)
	return r, nil
}

// withoutTPM returns the revision that lists the node. Another node may have listed a machine
// under its name since the keyring was looked at.
func withoutTPM(k *keyring.Keyring, req admin.ApproveNodeRequest) ([]*keyring.Keyring, error) {
	if err := checkApproval(k, req); err != nil {
		return nil, err
	}
	n := keyring.Node{Name: req.Node}
	if slices.ContainsFunc(k.Nodes(), n.SameTPM) {
		return nil, errNothing
	}
	next, err := k.WithNode(n, time.Now())
	if err != nil {
		return nil, err
	}
	return []*keyring.Keyring{next}, nil
}

// address returns the address that a joining node calls.
func (d *Desk) address() (string, error) {
	c := d.node.Config.Join
	if c.Listen == "" {
		return "", errors.New("join.listen is empty, so no node can join here; set join.listen to an address that the new node reaches, such as 192.0.2.1:9780, and restart kleidi serve")
	}
	if c.Advertise != "" {
		return c.Advertise, nil
	}
	host, _, _ := net.SplitHostPort(c.Listen)
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		return "", fmt.Errorf("join.listen, %s, names no address that another machine can call; set join.advertise, and restart kleidi serve", c.Listen)
	}
	return c.Listen, nil
}

func checkApproval(k *keyring.Keyring, req admin.ApproveNodeRequest) error {
	wanted := keyring.Node{Name: req.Node, EK: req.EK}
	if (req.EK == "") != req.NoTPM {
		return errors.New("want either --ek or --no-tpm; kleidi node identity on the new node shows its endorsement key")
	}
	if err := wanted.Check(); err != nil {
		return fmt.Errorf("node %.64q with endorsement key %.80q: %w; kleidi node identity on the new node shows both", req.Node, req.EK, err)
	}
	if req.Expires <= 0 || req.Expires > MaxExpiry {
		return fmt.Errorf("--expires %v; want up to %v", req.Expires, MaxExpiry)
	}
	if err := keyring.CheckSeat(k); err != nil {
		return err
	}
	self, _ := k.Self()
	for _, n := range k.Nodes() {
		switch {
		case n.Name == req.Node && n.Name == self.Name:
			return fmt.Errorf("node %s is this one; name the new node", n.Name)
		case n.Name == req.Node && n.EK != req.EK && !req.Replace:
			return fmt.Errorf("node %s is listed with the endorsement key %s; give --replace if another machine takes its place", n.Name, n.EK)
		case n.Name != req.Node && n.EK == req.EK && req.EK != "":
			return otherName(n)
		}
	}
	size := 0
	var names []string
	for _, f := range req.Files {
		names, size = append(names, f.Name), size+len(f.Content)
	}
	return join.CheckFiles(names, size)
}

// approval returns what the node must prove: the same as this node's configuration
// demands of this node.
func (d *Desk) approval(k *keyring.Keyring, req admin.ApproveNodeRequest) (*join.Approval, error) {
	c := d.node.Config.TPM
	a := &join.Approval{Node: req.Node, Expires: req.Expires, Seen: seenOf(k, req.Node), Approval: joinproof.Approval{EK: req.EK, Phase: c.Phase, AnySigned: c.AnySignedBoot}}
	var err error
	switch {
	case len(req.BootPolicy) > 0:
		if a.BootPolicy, err = bootpolicy.Parse(req.BootPolicy); err != nil {
			return nil, fmt.Errorf("--boot-policy: %w", err)
		}
	case c.BootPolicy != "":
		if a.BootPolicy, err = files.ReadBootPolicy(c.BootPolicy); err != nil {
			return nil, fmt.Errorf("tpm.bootPolicy: %w", err)
		}
	default:
		return nil, errors.New("nothing says how the node must have booted; give --boot-policy FILE, which kleidi bootpolicy record writes on a machine that booted as the node does")
	}
	if a.Verifier, err = d.verifierOf(k.ClusterID(), req.Node); err != nil {
		return nil, err
	}
	for _, s := range d.node.View.BootStates(k.Slots(), tpm.UseSigned) {
		a.Signers = append(a.Signers, *s.Signer)
	}
	return a, nil
}

// verifierOf returns the remote verifier that a node's slots must demand, if one is
// configured here.
func (d *Desk) verifierOf(cluster seal.ClusterID, name string) (*tpm.Verifier, error) {
	v, err := d.node.Remote.Demand(cluster)
	if v != nil {
		v.Ref = remote.PolicyRef(cluster, name)
	}
	return v, err
}

// upgrade writes the keyring in the format for several nodes, unless it has that
// format.
func (d *Desk) upgrade(ctx context.Context) (done bool, err error) {
	err = d.reviser.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		if k.Format() > 1 {
			return nil, errNothing
		}
		self, ok := k.Self()
		if !ok {
			return nil, errors.New("the keyring holds several nodes in the format for one")
		}
		self.Added = time.Now()
		if self.EK != "" {
			machine, err := d.node.TPM.Self(ctx)
			if err != nil {
				return nil, err
			}
			if machine.EK != self.EK {
				return nil, fmt.Errorf("the keyring is of the TPM with endorsement key %s, this machine has another one; run kleidi reseal --new-tpm first", self.EK)
			}
			self.SRK, self.EpochIndex = machine.SRK, machine.Epoch.Index()
		}
		next, err := k.Upgrade(self)
		if err != nil {
			return nil, err
		}
		return []*keyring.Keyring{next}, nil
	})
	if errors.Is(err, errNothing) {
		return false, nil
	}
	if err == nil && d.node.Replica != nil {
		d.node.Replica.Kick() // only a keyring of this format can be handed over to the cluster store
	}
	return err == nil, err
}

// lock takes the files into locked memory.
func (d *Desk) lock(in []admin.BootstrapFile) (out []join.SecretFile, err error) {
	defer func() {
		if err != nil {
			closeFiles(out)
		}
	}()
	for _, f := range in {
		if len(f.Content) == 0 {
			return out, fmt.Errorf("bootstrap file %s is empty", f.Name)
		}
		content, err := d.node.Memory.Take(slices.Clone(f.Content))
		if err != nil {
			return out, err
		}
		out = append(out, join.SecretFile{Name: f.Name, Content: content})
	}
	return out, nil
}

func closeFiles(all []join.SecretFile) {
	for _, f := range all {
		f.Content.Close()
	}
}

// List lists the nodes of the keyring.
func (d *Desk) List(ctx context.Context, _ admin.ListNodesRequest) (admin.NodeList, error) {
	k, err := d.node.Unlocker.Keyring()
	if err != nil {
		return admin.NodeList{}, err
	}
	self, _ := k.Self()
	l := list(k.Info(), k.Format(), self.Name, d.server.Unfinished())
	for _, a := range d.server.Unused() {
		l.Approvals = append(l.Approvals, admin.UnusedApproval(a))
	}
	records := rollout.Records(ctx, d.node, k)
	for i := range l.Nodes {
		r := records[l.Nodes[i].Node]
		l.Nodes[i].Record = r
		if r != nil && r.Behind == "" { // only the KEK makes such a record
			l.Nodes[i].Unfinished = false
		}
	}
	l.Cluster = rollout.Cluster(d.node, k)
	return l, nil
}

// ListStored lists the nodes of the stored keyring if no serve runs. Nothing
// authenticates that keyring.
func ListStored(ctx context.Context, n *node.Node) (admin.NodeList, error) {
	u, _, err := n.Stored(ctx)
	if err != nil {
		return admin.NodeList{}, err
	}
	l := list(u.Info(), u.Format(), n.Config.Node, nil)
	l.Stored = true
	return l, nil
}

func list(i keyring.Info, format int, self string, unfinished map[string]bool) admin.NodeList {
	l := admin.NodeList{ClusterID: i.ClusterID.String(), KeyID: i.Current.KeyID, Revision: i.Revision, Format: format, Commit: string(i.Commit), Seat: i.Seat, Nodes: []admin.NodeReport{}, Former: i.Former}
	for _, n := range i.Nodes {
		l.Nodes = append(l.Nodes, admin.NodeReport{Node: n.Name, EK: n.EK, Self: n.Name == self, Seat: n.Name == i.Seat, EpochIndex: n.EpochIndex, Added: n.Added, Unfinished: unfinished[n.Name]})
	}
	return l
}

func (d *Desk) approved() (names []string) {
	for _, a := range d.server.Unused() {
		names = append(names, a.Node)
	}
	return names
}

// Remove takes the next step of a removal. The removed nodes can no longer go on with a
// join.
func (d *Desk) Remove(ctx context.Context, req admin.RemoveNodesRequest) (admin.NodeRemoval, error) {
	s := leaving.Serve{Audit: func(all ...leaving.Record) error { return files.AppendJSON(&d.audit, all) }, Approved: d.approved, Forget: d.server.Forget}
	r, err := leaving.Remove(ctx, d.node, s, req)
	if err == nil && len(r.Changes) > 0 {
		d.node.Log.Info("nodes are removed", "nodes", req.Nodes, "phase", r.Phase, "revision", r.Revision)
	}
	return r, d.node.Advise(ctx, err)
}
