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
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/attest/joinproof"
)

// Reviser makes a revision of the shared keyring. It calls f with the open keyring, and
// commits the revisions that f returns, one after the other. Once it returns, they count
// as made.
type Reviser interface {
	Change(ctx context.Context, f func(*keyring.Keyring) ([]*keyring.Keyring, error)) error
}

// Desk answers joining nodes in a running serve. It implements [join.Host].
type Desk struct {
	node    *node.Node
	reviser Reviser
	audit   files.Log
	server  *join.Server
}

// NewDesk returns the desk of a serve. It opens nothing.
func NewDesk(n *node.Node) (*Desk, error) {
	d := &Desk{node: n, reviser: n.Unlocker, audit: files.Log{Path: n.Config.AuditPath()}}
	var err error
	d.server, err = join.NewServer(join.Options{Host: d, Record: d.record, Log: n.Log})
	return d, err
}

func (d *Desk) record(verdicts ...*join.Verdict) error { return files.AppendJSON(&d.audit, verdicts) }

// Handle makes the admin socket answer the operations that only a running serve can do.
func (d *Desk) Handle(s *admin.Server) {
	admin.Handle(s, admin.ApproveNode, afterFirstAttempt(d, d.Approve))
	admin.Handle(s, admin.ListNodes, afterFirstAttempt(d, d.List))
	admin.Handle(s, admin.RemoveNodes, afterFirstAttempt(d, d.Remove))
}

// firstAttempt bounds how long a verb waits for the first attempt to unlock.
const firstAttempt = 2 * time.Second

// afterFirstAttempt waits a moment for the first attempt to unlock: a command may follow
// the start of serve at once.
func afterFirstAttempt[Req, Resp any](d *Desk, f func(context.Context, Req) (Resp, error)) func(context.Context, Req) (Resp, error) {
	return func(ctx context.Context, req Req) (Resp, error) {
		select {
		case <-d.node.Unlocker.Tried():
		case <-time.After(firstAttempt):
		case <-ctx.Done():
		}
		return f(ctx, req)
	}
}

// MaxConns is the number of connections that [Desk.Serve] admits from peers without a proof.
const MaxConns = join.MaxConns

// Serve answers joining nodes at join.listen until it is stopped.
func (d *Desk) Serve() error {
	if err := d.audit.Append(nil); err != nil {
		return fmt.Errorf("audit.file: %w; without it no node can join", err)
	}
	l, err := net.Listen("tcp", d.node.Config.Join.Listen)
	if err != nil {
		return fmt.Errorf("join.listen: %w", err)
	}
	d.node.Log.Info("listening for joining nodes", "address", l.Addr().String(), "certificate", d.server.Certificate())
	return d.server.Serve(l)
}

// Stop ends the desk, and forgets the approvals.
func (d *Desk) Stop(ctx context.Context) { d.server.GracefulStop(ctx) }

// Verifier implements [join.Host].
func (d *Desk) Verifier() (*joinproof.Verifier, error) {
	k, err := d.node.Unlocker.Keyring()
	if err != nil {
		return nil, err
	}
	if k.Format() == 1 {
		return nil, errors.New("no node was approved yet, so the keyring is of one node")
	}
	return &joinproof.Verifier{Cluster: k.ClusterID(), Format: k.Format()}, nil
}

// errNothing leaves a change without a new revision.
var errNothing = errors.New("nothing to change")

// Admit implements [join.Host]. It wraps the KEKs for the node before it lists the
// node. The result leaves this process only afterwards.
func (d *Desk) Admit(ctx context.Context, p *joinproof.Proven, seen join.Seen) (*join.Admission, error) {
	a := &join.Admission{Node: entryOf(p)}
	var retired seal.KeyID
	err := d.reviser.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, listed, err := withNode(k, a.Node, seen)
		if err != nil {
			return nil, err
		}
		retired = ""
		if next.StagedID() == "" {
			retired = k.StagedID()
		}
		if err := d.grant(ctx, next, p, a); err != nil {
			if !listed {
				next.Close()
			}
			return nil, err
		}
		a.Keyring, a.KeyID, a.Revision = next.Shared(), next.CurrentID(), next.Revision()
		if listed {
			return nil, errNothing
		}
		return []*keyring.Keyring{next}, nil
	})
	if err != nil && !errors.Is(err, errNothing) {
		return nil, err
	}
	if retired != "" {
		d.node.Log.Warn("the rotation is aborted, because the replaced machine may know its KEK; rotate again", "node", a.Node.Name, "keyID", retired)
	}
	a.Done = func(transcript []byte) []byte {
		k, err := d.node.Unlocker.Keyring()
		if err != nil || k.CurrentID() != a.KeyID {
			return nil
		}
		return k.JoinDone(transcript)
	}
	return a, nil
}

func entryOf(p *joinproof.Proven) keyring.Node {
	return keyring.Node{Name: p.Peer.Node, EK: p.Peer.EK, SRK: p.Peer.SRK, EpochIndex: p.Peer.Epoch.Index()}
}

// withNode returns the revision that lists the node. listed says that k already lists
// it. k is the revision that the swap replaces, so nothing comes between: no other node has
// listed the machine under another name since its approval.
func withNode(k *keyring.Keyring, n keyring.Node, seen join.Seen) (next *keyring.Keyring, listed bool, err error) {
	if err := keyring.CheckSeat(k); err != nil {
		return nil, false, err
	}
	if slices.ContainsFunc(k.Nodes(), n.SameTPM) {
		return k, true, nil
	}
	if err := checkSeen(n, seenOf(k, n.Name), seen); err != nil {
		return nil, false, err
	}
	for _, other := range k.Nodes() {
		if other.Name != n.Name && other.EK == n.EK {
			e := otherName(other)
			return nil, false, exchange.Refuse(exchange.CheckEK, e.Hint, "%w", e.Err)
		}
	}
	next, err = k.WithNode(n, time.Now())
	return next, false, err
}

// otherName refuses a machine that is a node under another name, n.
func otherName(n keyring.Node) *seal.Error {
	return seal.Errorf("", "to let it join again, run kleidi node approve "+n.Name+" --ek "+n.EK+"; to give it another name, run kleidi node remove "+n.Name+" first",
		"the machine with that endorsement key is node %s already", n.Name)
}

// checkSeen refuses a machine if the keyring's entry for its name has changed since the
// approval: the approval does not say that the machine may come back after a removal, or
// that it may take the place of a node that has joined since. Another node may have made
// that change, and the present keyring may no longer show it: the machine may have joined
// there by another approval, and have been removed. But a removal ends with a fresh KEK.
func checkSeen(n keyring.Node, now, then join.Seen) error {
	again := "approve the node again, if that machine is to join: run kleidi node approve " + n.Name + " --ek " + n.EK
	switch {
	case now.Entry != nil && (then.Entry == nil || !now.Entry.SameTPM(*then.Entry)):
		return exchange.Refuse(exchange.CheckNode, again+" --replace", "another machine has become node %q since the approval", n.Name)
	case now.Entry != nil:
		return nil
	case then.Entry != nil || now.Former && !then.Former:
		return exchange.Refuse(exchange.CheckNode, again, "node %q was removed after this approval", n.Name)
	case now.KeyID != then.KeyID:
		return exchange.Refuse(exchange.CheckNode, again, "the KEK was rotated after this approval, as a removal of node %q does", n.Name)
	}
	return nil
}

// seenOf returns what a keyring says of a name.
func seenOf(k *keyring.Keyring, name string) join.Seen {
	return join.Seen{Entry: listedAs(k, name), KeyID: k.CurrentID(), Former: slices.Contains(k.Info().Former, name)}
}

// listedAs returns the keyring's entry under a name, or nil.
func listedAs(k *keyring.Keyring, name string) *keyring.Node {
	nodes := k.Nodes()
	if i := slices.IndexFunc(nodes, func(n keyring.Node) bool { return n.Name == name }); i >= 0 {
		return &nodes[i]
	}
	return nil
}

// grant wraps the KEKs of an open keyring for the node.
func (d *Desk) grant(ctx context.Context, k *keyring.Keyring, p *joinproof.Proven, a *join.Admission) error {
	slot, err := d.wrapFor(ctx, k.KEK(), p)
	if err != nil {
		return err
	}
	a.Current, a.Staged = []seal.Slot{slot}, nil
	if k.StagedID() == "" {
		return nil
	}
	staged := keyring.StagedKEK(k)
	if staged == nil {
		return fmt.Errorf("the staged KEK %s is not open here, and the node needs it too; run kleidi rotate --abort on a node where it is open", k.StagedID())
	}
	if slot, err = d.wrapFor(ctx, staged, p); err != nil {
		return err
	}
	a.Staged = []seal.Slot{slot}
	return nil
}

// wrapFor makes an import slot for the node's TPM. If two wrappers must open together,
// the shared wrapper makes the other half of the slot.
func (d *Desk) wrapFor(ctx context.Context, kek *seal.Secret, p *joinproof.Proven) (seal.Slot, error) {
	kind := d.node.View.TwoOfTwo()
	if kind == "" {
		return tpm.WrapFor(p.Peer, kek, p.State, p.Epoch)
	}
	second, _ := d.node.Wrapper(slotview.Second(kind)).(both.Part)
	if second == nil {
		return seal.Slot{}, fmt.Errorf("%s is not configured", slotview.Second(kind))
	}
	pair := &both.Wrapper{Kind: kind, Node: p.Peer.Node, Second: second, Memory: d.node.Memory}
	return pair.WrapWith(ctx, kek, func(_ context.Context, share *seal.Secret) (seal.Slot, error) {
		return tpm.WrapFor(p.Peer, share, p.State, p.Epoch)
	}, second.Wrap)
}
