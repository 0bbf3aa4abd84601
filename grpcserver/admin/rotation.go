package admin

import (
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// RotationPhase is the progress of a rotation.
type RotationPhase string

// The phases.
const (
	// RotationPreparing: nothing is staged yet and nothing was changed, because some
	// nodes have not yet recorded the present keyring.
	RotationPreparing RotationPhase = "preparing"
	// RotationStaged: nodes have yet to acknowledge the staged KEK.
	RotationStaged RotationPhase = "staged"
	// RotationSettling: nothing is staged, and nodes have yet to trust and announce the
	// current KEK.
	RotationSettling RotationPhase = "settling"
	// RotationDone: nothing is staged, and every node announces the current KEK.
	RotationDone RotationPhase = "done"
)

// Rotation is the rotation of several nodes.
type Rotation struct {
	Phase RotationPhase `json:"phase"`
	// StagedKeyID is the key ID of the staged KEK. By is the node that drives the rotation, and
	// Since the time of the staging.
	StagedKeyID seal.KeyID    `json:"stagedKeyID,omitempty"`
	By          string        `json:"by,omitempty"`
	Since       time.Time     `json:"since,omitzero"`
	Waiting     []WaitingNode `json:"waiting,omitempty"`
}

// ClusterReport is a node's knowledge of the cluster store.
type ClusterReport struct {
	// InStep says that the store held the node's keyring at the last read, which was at
	// Reached. Revision is the revision of the store's keyring.
	InStep   bool      `json:"inStep"`
	Reached  time.Time `json:"reached,omitzero"`
	Revision uint64    `json:"revision,omitempty"`
	Problem  *Problem  `json:"problem,omitempty"`
	Rotation *Rotation `json:"rotation,omitempty"`
	// Behind are the nodes that have not followed the present keyring.
	Behind []WaitingNode `json:"behind,omitempty"`
}

// NodeRecord is a node's last record in the cluster store.
type NodeRecord struct {
	Revision     uint64     `json:"revision"`
	Anchored     seal.KeyID `json:"anchored"`
	Announced    seal.KeyID `json:"announced"`
	Encrypted    seal.KeyID `json:"encrypted,omitempty"`
	Acknowledged seal.KeyID `json:"acknowledged,omitempty"`
	Formats      []int      `json:"formats"`
	Version      string     `json:"version"`
	// BootStates is the number of boot states that the node starts in.
	BootStates int       `json:"bootStates"`
	Started    time.Time `json:"started"`
	// Behind says why the node does not follow the present keyring; "" means that it does.
	Behind  string `json:"behind,omitempty"`
	Problem string `json:"problem,omitempty"`
}

// WaitingNode is a node that a rotation waits for.
type WaitingNode struct {
	Node string `json:"node"`
	Why  string `json:"why"`
	// Revision, Version and Problem are those of the node's last record.
	Revision uint64 `json:"revision,omitempty"`
	Version  string `json:"version,omitempty"`
	Problem  string `json:"problem,omitempty"`
}
