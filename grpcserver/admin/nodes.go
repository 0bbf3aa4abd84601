package admin

import (
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// The verbs of a cluster of several nodes.
const (
	// ApproveNode lets a node join once.
	ApproveNode Verb[ApproveNodeRequest, NodeApproval] = "approve-node"
	// ListNodes lists the nodes that may open the keyring.
	ListNodes Verb[ListNodesRequest, NodeList] = "list-nodes"
)

// ApproveNodeRequest names the node, and what is demanded of it.
type ApproveNodeRequest struct {
	Node string `json:"node"`
	// EK is the digest of its endorsement key; "" with NoTPM.
	EK string `json:"ek,omitempty"`
	// BootPolicy judges how it booted; empty means that of this node.
	BootPolicy []byte `json:"bootPolicy,omitempty"`
	// NoTPM lists a node that opens the keyring with a shared slot alone.
	NoTPM bool `json:"noTPM,omitempty"`
	// Replace lets another machine take the place of the node of that name.
	Replace bool `json:"replace,omitempty"`
	// Expires is how long the approval counts.
	Expires time.Duration `json:"expires"`
	// Files go to the node once it has proven its TPM and its boot.
	Files []BootstrapFile `json:"files,omitempty"`
}

// BootstrapFile is a file of the cluster's own bootstrap. Its content refuses to be
// printed or logged.
type BootstrapFile struct {
	Name    string   `json:"name"`
	Content Identity `json:"content"`
}

// Wipe clears the files' contents. [Handle] calls it when the handler has returned.
func (r *ApproveNodeRequest) Wipe() {
	for _, f := range r.Files {
		clear(f.Content)
	}
}

// NodeApproval is what a node joins with. Nothing in it is secret.
type NodeApproval struct {
	Node string `json:"node"`
	// Command is what to run on the node.
	Command     string    `json:"command"`
	Address     string    `json:"address,omitempty"`
	Certificate string    `json:"certificate,omitempty"`
	Trust       string    `json:"trust"`
	Expires     time.Time `json:"expires,omitzero"`
	// Changes say, one line each, what was done.
	Changes []string `json:"changes,omitempty"`
}

// ListNodesRequest asks for a [NodeList].
type ListNodesRequest struct{}

// NodeList is the nodes of the keyring.
type NodeList struct {
	ClusterID string       `json:"clusterID"`
	KeyID     seal.KeyID   `json:"keyID"`
	Revision  uint64       `json:"revision"`
	Format    int          `json:"format"`
	Commit    string       `json:"commit,omitempty"`
	Seat      string       `json:"seat,omitempty"`
	Nodes     []NodeReport `json:"nodes"`
	// Stored says that the list is of the stored keyring, which nothing has vouched for.
	Stored bool `json:"stored,omitempty"`
}

// NodeReport is one node.
type NodeReport struct {
	Node string `json:"node"`
	EK   string `json:"ek,omitempty"`
	// Self is this node, and Seat the one that may change what all nodes share.
	Self       bool      `json:"self,omitempty"`
	Seat       bool      `json:"seat,omitempty"`
	EpochIndex uint32    `json:"epochIndex,omitempty"`
	Added      time.Time `json:"added,omitzero"`
	// Unfinished says that the node was given the keyring and has not shown yet that it
	// opened it.
	Unfinished bool `json:"unfinished,omitempty"`
}
