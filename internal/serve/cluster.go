package serve

import (
	"context"

	"github.com/beezy-dev/kleidi/grpcserver"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

// keysOf returns the Keys that answer kube-apiserver.
func keysOf(n *node.Node) grpcserver.Keys {
	if n.Replica == nil {
		return n.Unlocker
	}
	return lookingKeys{n.Unlocker, n.Replica}
}

// lookingKeys look into the cluster store before they announce a key ID for the first
// time, so that a node that was down does not write under a KEK that the others have
// left. Decrypt does not wait, because the store's API may be waiting for it.
type lookingKeys struct {
	*unlock.Unlocker
	replica *replica.Replica
}

// CurrentID implements grpcserver.Keys.
func (k lookingKeys) CurrentID() (seal.KeyID, error) {
	k.replica.Look(context.Background())
	return k.Unlocker.CurrentID()
}

// Encrypt implements grpcserver.Keys.
func (k lookingKeys) Encrypt(plaintext []byte) ([]byte, seal.KeyID, error) {
	k.replica.Look(context.Background())
	return k.Unlocker.Encrypt(plaintext)
}
