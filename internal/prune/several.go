package prune

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/rollout"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

// gather bounds the wait for records that say under which KEK a node's kube-apiserver
// encrypts. A running node writes its record within moments of a change.
const gather = 5 * time.Second

// everyNodeEncrypts returns the keyring of several nodes once each node's record says
// that its kube-apiserver encrypts under the current KEK. It refuses otherwise, and names
// the nodes whose records don't say so. carried are the records of nodes that share no
// cluster store with this one.
func everyNodeEncrypts(ctx context.Context, n *node.Node, carried [][]byte) (*keyring.Keyring, error) {
	if n.Replica == nil {
		return carriedSay(ctx, n, carried)
	}
	if len(carried) > 0 {
		return nil, errors.New("--record is for nodes that share no cluster store; import the file with kleidi keyring import FILE")
	}
	if _, err := rollout.GetInStep(ctx, n); err != nil {
		return nil, err
	}
	limit := time.After(gather)
	for {
		again := time.After(time.Second)
		k, err := n.Unlocker.Keyring()
		if err != nil {
			return nil, err
		}
		reports, err := n.Replica.Reports(ctx)
		if err != nil {
			return nil, err
		}
		missing := rollout.Encrypting(k, reports)
		if len(missing) == 0 {
			return k, nil
		}
		select {
		case <-again:
		case <-limit:
			return nil, refuse(missing)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// carriedSay does the work of everyNodeEncrypts with this node's own record and the carried
// records, without a cluster store. A record of the present revision was written after the
// keyring had that revision.
func carriedSay(ctx context.Context, n *node.Node, carried [][]byte) (*keyring.Keyring, error) {
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return nil, err
	}
	if err := keyring.CheckSeat(k); err != nil {
		return nil, err
	}
	_, own, err := node.Carrier(n).Export(ctx)
	if err != nil {
		return nil, err
	}
	var records []*keyring.VerifiedRecord
	for _, b := range append([][]byte{own}, carried...) {
		u, err := keyring.ParseRecord(b)
		if err != nil {
			return nil, err
		}
		r, err := u.Verify(k)
		if err != nil {
			return nil, err
		}
		if r.Revision == k.Revision() {
			records = append(records, r)
		}
	}
	var missing []admin.WaitingNode
	for _, m := range rotation.Encrypting(k, records) {
		if m.Why == rotation.WhyNoRecord {
			m.Why = "no record from after the last change of the keyring is named"
		}
		missing = append(missing, admin.WaitingNode{Node: m.Node, Why: string(m.Why)})
	}
	if len(missing) > 0 {
		return nil, seal.AddHint(refuse(missing), "without a cluster store, carry the keyring to each node, run kleidi keyring export FILE there, and name the files with --record")
	}
	return k, nil
}

func refuse(missing []admin.WaitingNode) error {
	var all []string
	for _, m := range missing {
		all = append(all, "node "+m.Node+": "+m.Why)
	}
	return &seal.Error{
		Err:  fmt.Errorf("not every node is known to encrypt under the current KEK: %s; nothing was changed", strings.Join(all, "; ")),
		Hint: "start those nodes, and restart kube-apiserver there if kleidi serve was restarted after it; remove a node that will not come back with kleidi node remove NAME",
	}
}
