package carry

import (
	"context"
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// Export returns the shared keyring and this node's record, for another node.
func Export(ctx context.Context, n *node.Node, _ admin.ExportKeyringRequest) (admin.KeyringExport, error) {
	shared, record, err := node.Carrier(n).Export(ctx)
	if err != nil {
		return admin.KeyringExport{}, fmt.Errorf("export: %w", err)
	}
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return admin.KeyringExport{}, err
	}
	return admin.KeyringExport{CurrentKeyID: k.CurrentID(), Revision: k.Revision(), Keyring: shared, Record: record}, nil
}

// Import takes the export of another node: its keyring if it is newer, and its record if
// this node has access to the cluster store.
func Import(ctx context.Context, n *node.Node, req admin.ImportKeyringRequest) (admin.KeyringState, error) {
	s, err := importFile(ctx, n, req)
	if err != nil {
		err = fmt.Errorf("import: %w", err)
	}
	return s, err
}

func importFile(ctx context.Context, n *node.Node, req admin.ImportKeyringRequest) (admin.KeyringState, error) {
	remote, err := keyring.Parse(req.Keyring)
	if err != nil {
		return admin.KeyringState{}, seal.WithHint(err, "export it again with kleidi keyring export FILE")
	}
	if req.TrustKeyID != "" {
		return importTrusted(ctx, n, remote, req.TrustKeyID)
	}
	from, err := keyring.ParseRecord(req.Record)
	if err != nil {
		return admin.KeyringState{}, err
	}
	former, err := n.Unlocker.CurrentID()
	if err != nil {
		return admin.KeyringState{}, err
	}
	var changes []string
	switch followed, err := node.Carrier(n).Import(ctx, remote); {
	case errors.Is(err, keyring.ErrOlder) && n.Replica != nil:
		changes = append(changes, fmt.Sprintf("the keyring of revision %d is older than this node's, which stays", remote.Revision()))
	case errors.Is(err, keyring.ErrOlder):
		k, _ := n.Unlocker.Keyring()
		return admin.KeyringState{}, seal.Errorf(seal.CauseAnchor, "export it again on a node that has the newest one", "the keyring of revision %d is older than this node's, which has revision %d", remote.Revision(), k.Revision())
	case err != nil:
		return admin.KeyringState{}, hinted(n, remote, err)
	case followed:
		changes = append(changes, fmt.Sprintf("this node has taken the keyring of revision %d", remote.Revision()))
	default:
		changes = append(changes, "this node has that keyring already")
	}
	changes, err = putRecord(ctx, n, from, req.Record, changes)
	if err != nil {
		return admin.KeyringState{}, err
	}
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return admin.KeyringState{}, err
	}
	if k.StagedID() != "" && n.Replica == nil {
		changes = append(changes, "this node has acknowledged the staged KEK: run kleidi keyring export FILE here, and import the file on a node with access to the cluster store")
	}
	return n.Result(former, changes...)
}

// hinted adds the next step to err, the reason why this node does not take remote. To the
// rules, a keyring under a KEK that this node has left looks like a stranger's; at the end of a
// fork it is the one to take.
func hinted(n *node.Node, remote *keyring.Untrusted, err error) error {
	k, locked := n.Unlocker.Keyring()
	if locked != nil || seal.CauseOf(err) != seal.CauseAnchor || seal.CauseOf(keyring.Precedes(remote, k)) != seal.CauseForked {
		return err
	}
	return seal.WithHint(err, "this node holds that KEK, but has left it; if kleidi keyring publish has ended a fork with this keyring, run kleidi keyring import FILE --trust-key-id KEY_ID with the key ID that publish has printed; otherwise find out who made it, because a removed node can")
}

// putRecord puts the record of a node that has no access to the cluster store into the
// store.
func putRecord(ctx context.Context, n *node.Node, from *keyring.UntrustedRecord, record []byte, changes []string) ([]string, error) {
	k, err := n.Unlocker.Keyring()
	if err != nil || n.Replica == nil {
		return changes, err
	}
	if self, _ := k.Self(); from.Node() == self.Name {
		return changes, nil
	}
	if _, err := from.Verify(k); err != nil {
		return nil, err
	}
	if err := n.Replica.PutRecord(ctx, from.Node(), record); err != nil {
		return nil, seal.WithHint(fmt.Errorf("the record of node %s: %w", from.Node(), err), "let this node write that record, as \"Nodes without access to the API\" in docs/high-availability.md shows")
	}
	return append(changes, "the record of node "+from.Node()+" is in the cluster store"), nil
}

// importTrusted takes a keyring at the end of a fork, because an operator vouches for it.
func importTrusted(ctx context.Context, n *node.Node, remote *keyring.Untrusted, trusted seal.KeyID) (admin.KeyringState, error) {
	former, err := n.Unlocker.CurrentID()
	if err != nil {
		return admin.KeyringState{}, err
	}
	if err := node.Carrier(n).ImportTrusted(ctx, n.Memory, remote, trusted); err != nil {
		return admin.KeyringState{}, err
	}
	return n.Result(former, fmt.Sprintf("this node has taken the keyring of revision %d, on your authority, and sealed its KEK to its own boot states", remote.Revision()))
}

// Publish puts this node's keyring into the cluster store in place of another one,
// because an operator says so.
func Publish(ctx context.Context, n *node.Node, req admin.PublishKeyringRequest) (admin.KeyringState, error) {
	former, err := n.Unlocker.CurrentID()
	if err != nil {
		return admin.KeyringState{}, err
	}
	if n.Replica == nil {
		return admin.KeyringState{}, fmt.Errorf("publish: %w", seal.Errorf(seal.CauseConfiguration, "run the command on a node where cluster.kubeconfig is set", "this node has no access to the cluster store"))
	}
	if err := n.Replica.Publish(ctx, n.Memory, req.Discard); err != nil {
		return admin.KeyringState{}, fmt.Errorf("publish: %w", err)
	}
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return admin.KeyringState{}, err
	}
	return n.Result(former, fmt.Sprintf("the cluster store holds this node's keyring, as revision %d", k.Revision()),
		"on each node that does not follow, import what kleidi keyring export FILE writes here: kleidi keyring import FILE --trust-key-id "+string(k.CurrentID()))
}
