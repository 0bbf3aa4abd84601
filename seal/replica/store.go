package replica

import (
	"context"
	"errors"

	"github.com/beezy-dev/kleidi/seal/store"
)

// ErrNoStore says that there is no way to the store yet: no connection was attempted.
var ErrNoStore = errors.New("it can't be reached from here")

// hintStore is for a store that does not answer.
const hintStore = "see cluster.kubeconfig and kube-apiserver"

// Store is the cluster store: one shared keyring, and a record of each node. It is
// trusted only for the order of swaps. Somebody may restore it from an older snapshot
// at any time, and an attacker who can write it may put anything there.
type Store interface {
	// Load returns the shared keyring. The error is fs.ErrNotExist if there is none.
	Load(context.Context) ([]byte, error)
	// Swap replaces old with next if the store holds exactly the bytes of old; nil
	// means no keyring. The error is [store.ErrConflict] if the store holds other
	// bytes; then nothing has happened, and nothing will. After any other error the
	// swap may have happened, and may still happen.
	// After an error with the cause seal.CauseCredentials or seal.CauseConfiguration
	// it did not: the store refuses this node, or this keyring.
	Swap(ctx context.Context, old, next []byte) error
	// Records returns the records of these nodes, in their order, without nodes that
	// have none.
	Records(ctx context.Context, nodes ...string) ([]store.NodeRecord, error)
	// PutRecord replaces the record of a node.
	PutRecord(ctx context.Context, node string, record []byte) error
	// Watch calls changed when it has connected, and then whenever the store may have
	// changed, until ctx ends. It may miss changes, so the caller also reads at intervals.
	Watch(ctx context.Context, changed func())
}
