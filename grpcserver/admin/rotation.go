package admin

import (
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// WatchRotation reports how far a rotation of several nodes is.
const WatchRotation Verb[WatchRotationRequest, KeyringState] = "watch-rotation"

// WatchRotationRequest asks for a [KeyringState] with its Rotation.
type WatchRotationRequest struct{}

// RotationPhase is how far a rotation is.
type RotationPhase string

// The phases.
const (
	// RotationPreparing: nothing is staged yet, and nothing was changed, because nodes have no
	// record after the present keyring.
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

// ClusterReport is what a node knows of the cluster store.
type ClusterReport struct {
	// InStep says that the store held the node's keyring at the last read, which was at
	// Reached. Revision is that of the store.
	InStep   bool      `json:"inStep"`
	Reached  time.Time `json:"reached,omitzero"`
	Revision uint64    `json:"revision,omitempty"`
	Problem  *Problem  `json:"problem,omitempty"`
	Rotation *Rotation `json:"rotation,omitempty"`
	// Behind are the nodes that have not followed the present keyring.
	Behind []WaitingNode `json:"behind,omitempty"`
}

// NodeRecord is what a node last said of itself in the cluster store.
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
