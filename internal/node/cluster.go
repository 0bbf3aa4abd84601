package node

import (
	"context"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/version"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

// Carrier returns the Replica that takes and gives carried keyrings on this node, which
// may have no cluster store.
func Carrier(n *Node) *replica.Replica {
	if n.Replica != nil {
		return n.Replica
	}
	return replicaOver(n, nil)
}

func replicaOver(n *Node, s replica.Store) *replica.Replica {
	var machine func(context.Context) (keyring.Node, error)
	if n.View.OpensWithTPM() {
		machine = func(ctx context.Context) (keyring.Node, error) { return Machine(ctx, n) }
	}
	return replica.New(replica.Config{
		Store: s, Unlocker: n.Unlocker, Machine: machine, Wrap: wrapStaged(n), BootStates: func(ctx context.Context, k *keyring.Keyring) ([]keyring.RecordedState, error) {
			own, err := n.Unrevoked(ctx, k.OwnSlots())
			if err != nil {
				return nil, err
			}
			return n.View.RecordStates(own, k.ClusterID())
		}, Archives: archives(n), Removal: n.State.File(n.Config.Removal()), Version: version.String(), Log: n.Log,
	})
}

// Machine describes this machine's TPM, as this node's entry in a keyring of format 2 does.
func Machine(ctx context.Context, n *Node) (keyring.Node, error) {
	p, err := n.TPM.Self(ctx)
	return keyring.Node{Name: n.Config.Node, EK: p.EK, SRK: p.SRK, EpochIndex: n.Config.TPM.EpochIndex}, err
}

// wrapStaged seals the staged KEK for each boot state of this node's own slots of the
// current KEK.
func wrapStaged(n *Node) func(context.Context, *keyring.Keyring, *seal.Secret) ([]seal.Slot, error) {
	return func(ctx context.Context, k *keyring.Keyring, kek *seal.Secret) ([]seal.Slot, error) {
		own, err := n.Unrevoked(ctx, k.OwnSlots())
		if err != nil {
			return nil, err
		}
		slots, err := rotation.Like(n.ProvenRewrappers(k), own)(ctx, kek)
		if err == nil {
			err = rotation.ProveTryable(ctx, kek, slots, n.Openers())
		}
		return slots, err
	}
}

// archives reads the archive of a pruned KEK in the state folder and in the cluster store.
func archives(n *Node) func(context.Context, seal.KeyID) map[string][]byte {
	return func(ctx context.Context, id seal.KeyID) map[string][]byte {
		path := n.Config.ArchivePath(id)
		file, _ := files.Read(path, keyring.MaxArchiveSize)
		stored, _ := n.Archives.Archive(ctx, string(id))
		return map[string][]byte{path: file, string(id): stored}
	}
}
