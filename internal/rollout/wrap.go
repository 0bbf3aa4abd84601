package rollout

import (
	"context"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// wrapForAll wraps a KEK for every boot state in the nodes' records. This node is no
// exception: it may end before it has sealed the KEK itself.
func wrapForAll(ctx context.Context, n *node.Node, k *keyring.Keyring, kek *seal.Secret, records []*keyring.VerifiedRecord) (all []seal.Slot, err error) {
	for _, entry := range k.Nodes() {
		at := slices.IndexFunc(records, func(r *keyring.VerifiedRecord) bool { return r.Node == entry.Name })
		if entry.EK == "" || at < 0 {
			continue // a node without a TPM opens a shared slot
		}
		slots, err := wrapFor(ctx, n, entry, k.ClusterID(), kek, records[at].BootStates)
		if err != nil {
			return nil, fmt.Errorf("for node %s: %w", entry.Name, err)
		}
		all = append(all, slots...)
	}
	return all, nil
}

// wrapFor wraps a KEK for a node's boot states, in import slots.
func wrapFor(ctx context.Context, n *node.Node, entry keyring.Node, cluster seal.ClusterID, kek *seal.Secret, states []keyring.RecordedState) (all []seal.Slot, err error) {
	counter, err := nv.NewCounter(entry.EpochIndex, keys.Owner{})
	if err != nil {
		return nil, err
	}
	peer := tpm.Peer{Node: entry.Name, EK: entry.EK, SRK: entry.SRK, Epoch: counter}
	for _, recorded := range states {
		state, err := slotview.BootStateOf(recorded, cluster)
		if err != nil {
			return nil, fmt.Errorf("its record: %w", err)
		}
		half := func(_ context.Context, share *seal.Secret) (seal.Slot, error) {
			return tpm.WrapFor(peer, share, state, recorded.AtMost)
		}
		slot, err := wrapState(ctx, n, peer, kek, recorded.Second, half)
		if err != nil {
			return nil, err
		}
		all = append(all, slot)
	}
	return all, nil
}

// wrapState wraps a KEK with the TPM alone or, where the node demands two of two, splits
// it: this node's second wrapper, which all nodes share, holds the other half.
func wrapState(ctx context.Context, n *node.Node, peer tpm.Peer, kek *seal.Secret, second string, half both.Wrap) (seal.Slot, error) {
	if second == "" {
		return half(ctx, kek)
	}
	kind := slotview.WithTPM(second)
	w, _ := n.Wrapper(second).(both.Part)
	if kind == "" || w == nil {
		return seal.Slot{}, seal.Errorf(seal.CauseConfiguration, "configure "+second+" on this node, or rotate from a node that has it", "it opens only with its TPM and %s together, and this node has no %s", second, second)
	}
	pair := &both.Wrapper{Kind: kind, Node: peer.Node, Second: w, Memory: n.Memory}
	return pair.WrapWith(ctx, kek, half, w.Wrap)
}
