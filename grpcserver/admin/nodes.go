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

// ApproveNodeRequest names the node, and the demands on it.
type ApproveNodeRequest struct {
	Node string `json:"node"`
	// EK is the digest of its endorsement key; "" with NoTPM.
	EK string `json:"ek,omitempty"`
	// BootPolicy judges the node's boot; empty means the boot policy of this node.
	BootPolicy []byte `json:"bootPolicy,omitempty"`
	// NoTPM lists a node that opens the keyring only with a shared slot.
	NoTPM bool `json:"noTPM,omitempty"`
	// Replace lets another machine replace the node with that name.
	Replace bool `json:"replace,omitempty"`
	// Expires is how long the approval is valid.
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

// NodeApproval holds everything that a node needs to join. Nothing in it is secret.
type NodeApproval struct {
	Node string `json:"node"`
	// Command is the command to run on the node.
	Command     string    `json:"command"`
	Address     string    `json:"address,omitempty"`
	Certificate string    `json:"certificate,omitempty"`
	Trust       string    `json:"trust"`
	Expires     time.Time `json:"expires,omitzero"`
	// Changes list what was done, one line each.
	Changes []string `json:"changes,omitempty"`
}

// ListNodesRequest asks for a [NodeList].
type ListNodesRequest struct{}

// NodeList lists the nodes of the keyring.
type NodeList struct {
	ClusterID string       `json:"clusterID"`
	KeyID     seal.KeyID   `json:"keyID"`
	Revision  uint64       `json:"revision"`
	Format    int          `json:"format"`
	Commit    string       `json:"commit,omitempty"`
	Seat      string       `json:"seat,omitempty"`
	Nodes     []NodeReport `json:"nodes"`
	// Former are the removed nodes that know the current KEK, and the names under which
	// another machine knew it before. A rotation ends that.
	Former []string `json:"former,omitempty"`
	// Approvals are the approvals that no node has used since this serve started.
	Approvals []UnusedApproval `json:"approvals,omitempty"`
	// Stored says that the list comes from the stored keyring, for which nothing has vouched.
	Stored bool `json:"stored,omitempty"`
	// Cluster is this node's knowledge of the cluster store.
	Cluster *ClusterReport `json:"cluster,omitempty"`
}

// UnusedApproval is an approval that no node has used.
type UnusedApproval struct {
	Node    string    `json:"node"`
	EK      string    `json:"ek"`
	Until   time.Time `json:"until"`
	Expired bool      `json:"expired,omitempty"`
}

// NodeReport describes one node.
type NodeReport struct {
	Node string `json:"node"`
	EK   string `json:"ek,omitempty"`
	// Self marks this node, and Seat the node that may change what all nodes share.
	Self       bool      `json:"self,omitempty"`
	Seat       bool      `json:"seat,omitempty"`
	EpochIndex uint32    `json:"epochIndex,omitempty"`
	Added      time.Time `json:"added,omitzero"`
	// Unfinished says that the node received the keyring and has not yet shown that it
	// opened it.
	Unfinished bool `json:"unfinished,omitempty"`
	// Record is the node's last record in the cluster store.
	Record *NodeRecord `json:"record,omitempty"`
}

// The verbs that carry the shared keyring to and from a node without access to the cluster
// store.
const (
	// ExportKeyring returns the shared keyring and the node's record.
	ExportKeyring Verb[ExportKeyringRequest, KeyringExport] = "export-keyring"
	// ImportKeyring takes what another node exported.
	ImportKeyring Verb[ImportKeyringRequest, KeyringState] = "import-keyring"
)

// ExportKeyringRequest asks for a [KeyringExport].
type ExportKeyringRequest struct{}

// KeyringExport is what one node gives to another. Nothing in it is secret.
type KeyringExport struct {
	CurrentKeyID seal.KeyID `json:"currentKeyID"`
	Revision     uint64     `json:"revision"`
	Keyring      []byte     `json:"keyring"`
	Record       []byte     `json:"record"`
}

// ImportKeyringRequest carries a [KeyringExport] of another node.
type ImportKeyringRequest struct {
	Keyring []byte `json:"keyring"`
	Record  []byte `json:"record"`
	// TrustKeyID is the current key ID of the keyring that the operator vouches for, at the end
	// of a fork. The node must hold its KEK.
	TrustKeyID seal.KeyID `json:"trustKeyID,omitempty"`
}

// PublishKeyring puts the node's keyring into the cluster store in place of another one.
const PublishKeyring Verb[PublishKeyringRequest, KeyringState] = "publish-keyring"

// PublishKeyringRequest says what becomes of the other keyring.
type PublishKeyringRequest struct {
	// Discard takes none of its KEKs.
	Discard bool `json:"discard,omitempty"`
}

// RemoveNodes takes the next step of a removal of nodes.
const RemoveNodes Verb[RemoveNodesRequest, NodeRemoval] = "remove-nodes"

// RemoveNodesRequest names the nodes to remove. It is repeated until the removal is done.
type RemoveNodesRequest struct {
	Nodes []string `json:"nodes"`
	// Begun says that an earlier request of this command has found the nodes.
	Begun bool `json:"begun,omitempty"`
	// SkipSlots, AcceptDataLoss and Confirmed are as in [RotateRequest].
	SkipSlots      []string `json:"skipSlots,omitempty"`
	AcceptDataLoss bool     `json:"acceptDataLoss,omitempty"`
	Confirmed      []string `json:"confirmed,omitempty"`
}

// RemovalPhase is how far a removal is.
type RemovalPhase string

// The phases.
const (
	// RemovalFollowing: the nodes are dropped, and nodes have yet to follow that.
	RemovalFollowing RemovalPhase = "following"
	// RemovalStaged: a fresh KEK is staged, and nodes have yet to acknowledge it.
	RemovalStaged RemovalPhase = "staged"
	// RemovalSettling: the fresh KEK is current, and nodes have yet to trust it.
	RemovalSettling RemovalPhase = "settling"
	// RemovalDone: every node trusts the fresh KEK, and no keyring made with what the removed
	// nodes know.
	RemovalDone RemovalPhase = "done"
)

// NodeRemoval is how far a removal is.
type NodeRemoval struct {
	// Nodes are the removed nodes; none if the names were only approved to join.
	Nodes        []string     `json:"nodes"`
	Phase        RemovalPhase `json:"phase"`
	CurrentKeyID seal.KeyID   `json:"currentKeyID"`
	Revision     uint64       `json:"revision"`
	// Former are the removed nodes that know the current KEK.
	Former []string `json:"former,omitempty"`
	// Trusting are the nodes that still trust what the removed ones know.
	Trusting []string      `json:"trusting,omitempty"`
	Waiting  []WaitingNode `json:"waiting,omitempty"`
	// WaysIn lists what opens the keyring, one line each.
	WaysIn []string `json:"waysIn,omitempty"`
	// Changes list what was done, one line each.
	Changes []string `json:"changes,omitempty"`
}
