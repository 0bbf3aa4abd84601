package rollout

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
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

// wrapState wraps a KEK with the TPM alone or, if the node demands two-of-two, splits it:
// this node's second wrapper, which all nodes share, holds the other half.
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

// wrapAnew wraps the staged KEK of k for those boot states of missing nodes that have no
// slot yet: such a node has booted in another way since the KEK was staged.
func wrapAnew(ctx context.Context, n *node.Node, k *keyring.Keyring, missing []rotation.Missing) error {
	kek := keyring.StagedKEK(k)
	if kek == nil {
		return nil // the round that opens the staged KEK has not ended
	}
	var more []seal.Slot
	for _, r := range n.Replica.State().Reports {
		at := slices.IndexFunc(missing, func(m rotation.Missing) bool { return m.Node == r.Node })
		entry := slices.IndexFunc(k.Nodes(), func(e keyring.Node) bool { return e.Name == r.Node && e.EK != "" })
		if !r.Counts || at < 0 || entry < 0 || r.Record.KeyID != k.CurrentID() {
			continue
		}
		slots, err := wrapFor(ctx, n, k.Nodes()[entry], k.ClusterID(), kek, notWrapped(k, k.Nodes()[entry], r.Record.BootStates))
		if err != nil {
			return fmt.Errorf("wrap the staged KEK for node %s: %w", r.Node, err)
		}
		more = append(more, slots...)
	}
	if len(more) == 0 {
		return nil
	}
	n.Log.Info("rotation: a node boots in another way than when the KEK was staged; wrapping the KEK for it", "keyID", k.StagedID(), "slots", len(more))
	return n.Unlocker.Change(ctx, func(now *keyring.Keyring) ([]*keyring.Keyring, error) {
		if now.Revision() != k.Revision() {
			return nil, errors.New("the keyring has changed meanwhile")
		}
		next, err := keyring.WithStagedSlots(now, more)
		return []*keyring.Keyring{next}, err
	})
}

// notWrapped returns the boot states for which the staged KEK has no import slot.
func notWrapped(k *keyring.Keyring, entry keyring.Node, states []keyring.RecordedState) (all []keyring.RecordedState) {
	counter, err := nv.NewCounter(entry.EpochIndex, keys.Owner{})
	if err != nil {
		return nil
	}
	mine := slices.DeleteFunc(k.StagedSlots(), func(s seal.Slot) bool { return s.Node != entry.Name })
	wrapped, err := slotview.Reader{Node: entry.Name, Counter: counter}.RecordStates(mine, k.ClusterID())
	for _, s := range states {
		if err == nil && !slices.ContainsFunc(wrapped, func(w keyring.RecordedState) bool { return sameState(w, s) }) {
			all = append(all, s)
		}
	}
	return all
}

// sameState compares boot states. An empty reference equals a missing one.
func sameState(a, b keyring.RecordedState) bool {
	var text [2][]byte
	for i, s := range []keyring.RecordedState{a, b} {
		j, err := json.Marshal(s)
		if err != nil {
			return false
		}
		text[i] = bytes.ReplaceAll(j, []byte("null"), []byte(`""`))
	}
	return bytes.Equal(text[0], text[1])
}
