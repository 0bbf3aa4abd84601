package keyring

import (
	"bytes"
	"fmt"

	"github.com/beezy-dev/kleidi/seal"
)

// Limits of format 2 that format 1 does not have.
const (
	// MaxSRK bounds the public area of a node's storage root key, in bytes; the TCG's
	// ECC P-256 template has 90.
	MaxSRK = 128
	// FirstEpochIndex and LastEpochIndex bound the owner's range of NV indexes, in
	// which a node's epoch counter is.
	FirstEpochIndex, LastEpochIndex = 0x0180_0000, 0x01BF_FFFF
)

const format2 = 2

// Commit says where a change of the shared keyring counts as made.
type Commit string

// The values of Commit. CommitCluster never goes back to CommitLocal.
const (
	// CommitLocal: in the file of the node that has the seat.
	CommitLocal Commit = "local"
	// CommitCluster: in the cluster store.
	CommitCluster Commit = "cluster"
)

// body2 is the body of format 2, the shared keyring. Members stand in this order.
type body2 struct {
	Format    int            `json:"format"`
	ClusterID seal.ClusterID `json:"clusterID"`
	Revision  uint64         `json:"revision"`
	Commit    Commit         `json:"commit"`
	Seat      string         `json:"seat,omitempty"`
	Current   slotted2       `json:"current"`
	Staged    *slotted2      `json:"staged,omitempty"`
	Retired   []retired2     `json:"retired,omitempty"`
	Nodes     []node2        `json:"nodes"`
	Former    []string       `json:"former,omitempty"` // removed nodes that know the current KEK
}

// slotted2 is a KEK that is held in slots: in shared slots, which name no node, and,
// while it is staged, in import slots, each of which names its node.
type slotted2 struct {
	KeyID   seal.KeyID  `json:"keyID"`
	Created stamp       `json:"created"`
	By      string      `json:"by,omitempty"` // of a staged KEK: the node that drives the rotation
	Slots   []seal.Slot `json:"slots,omitempty"`
}

// retired2 is a retired KEK, encrypted under the current one.
type retired2 struct {
	KeyID   seal.KeyID `json:"keyID"`
	Created stamp      `json:"created"`
	Retired stamp      `json:"retired"`
	Unused  bool       `json:"unused,omitempty"` // staged, and never current
	Sealed  []byte     `json:"sealed"`
}

// node2 is a control-plane machine. A machine without a TPM has no ek, srk and
// epochIndex.
type node2 struct {
	Name       string `json:"name"`
	EK         string `json:"ek,omitempty"`
	SRK        []byte `json:"srk,omitempty"`
	EpochIndex uint32 `json:"epochIndex,omitempty"`
	Added      stamp  `json:"added"`
}

// parseBody2 reads a body of format 2 and checks everything that can be checked
// without a KEK.
func parseBody2(b []byte) (*body2, error) {
	body := new(body2)
	if err := decode(b, body); err != nil {
		return nil, err
	}
	return body, body.check()
}

func (b *body2) check() error {
	if b.Format != format2 {
		return fmt.Errorf("format is %d, want %d", b.Format, format2)
	}
	if b.Revision == 0 || b.Revision > MaxRevision {
		return fmt.Errorf("revision %d is not between 1 and %d", b.Revision, uint64(MaxRevision))
	}
	nodes, err := checkNodes2(b.Nodes)
	if err != nil {
		return err
	}
	if err := b.checkCommit(nodes); err != nil {
		return err
	}
	if err := checkFormer(b.Former); err != nil {
		return err
	}
	if err := b.Current.check(nil); err != nil {
		return fmt.Errorf("current: %w", err)
	}
	if b.Staged != nil {
		if err := b.Staged.check(nodes); err != nil {
			return fmt.Errorf("staged: %w", err)
		}
	}
	return b.checkRetired()
}

func (b *body2) checkCommit(nodes map[string]bool) error {
	switch {
	case b.Commit == CommitLocal && !nodes[b.Seat]:
		return fmt.Errorf("seat %.64q is not among the nodes", b.Seat)
	case b.Commit == CommitCluster && b.Seat != "":
		return fmt.Errorf("a seat beside commit %q", CommitCluster)
	case b.Commit != CommitLocal && b.Commit != CommitCluster:
		return fmt.Errorf("commit is %.64q, want %q or %q", string(b.Commit), CommitLocal, CommitCluster)
	}
	return nil
}

func checkFormer(names []string) error {
	if len(names) > MaxNodes {
		return fmt.Errorf("%d former nodes, at most %d", len(names), MaxNodes)
	}
	for i, name := range names {
		if !nodeName.MatchString(name) || i > 0 && name <= names[i-1] {
			return fmt.Errorf("former[%d]: malformed name, or not in order", i)
		}
	}
	return nil
}

func (b *body2) checkRetired() error {
	if len(b.Retired) > MaxRetired {
		return fmt.Errorf("%d retired KEKs, at most %d", len(b.Retired), MaxRetired)
	}
	seen := map[seal.KeyID]bool{b.Current.KeyID: true}
	if b.Staged != nil {
		if seen[b.Staged.KeyID] {
			return fmt.Errorf("staged KEK is the current one")
		}
		seen[b.Staged.KeyID] = true
	}
	for i, r := range b.Retired {
		if !validKeyID(r.KeyID) {
			return fmt.Errorf("retired[%d]: malformed key ID", i)
		}
		if seen[r.KeyID] {
			return fmt.Errorf("retired[%d]: key ID %s occurs twice", i, r.KeyID)
		}
		if len(r.Sealed) != seal.KEKSize+gcmOverhead {
			return fmt.Errorf("retired[%d]: sealed has %d bytes, want %d", i, len(r.Sealed), seal.KEKSize+gcmOverhead)
		}
		seen[r.KeyID] = true
	}
	return nil
}

// check allows import slots for the given nodes; nil allows none.
func (s *slotted2) check(nodes map[string]bool) error {
	if !validKeyID(s.KeyID) {
		return fmt.Errorf("malformed key ID")
	}
	if s.By != "" && !nodes[s.By] {
		return fmt.Errorf("by %.64q: no staged KEK, or no such node", s.By)
	}
	count := map[string]int{}
	for i, slot := range s.Slots {
		if err := checkSlot(slot, nodes); err != nil {
			return fmt.Errorf("slots[%d]: %w", i, err)
		}
		if count[slot.Node]++; count[slot.Node] > MaxSlots {
			return fmt.Errorf("more than %d slots for node %q", MaxSlots, slot.Node)
		}
	}
	return nil
}

func checkNodes2(nodes []node2) (map[string]bool, error) {
	if len(nodes) == 0 || len(nodes) > MaxNodes {
		return nil, fmt.Errorf("%d nodes, want 1 to %d", len(nodes), MaxNodes)
	}
	names, eks := map[string]bool{}, map[string]bool{}
	for i, n := range nodes {
		if err := n.check(); err != nil {
			return nil, fmt.Errorf("nodes[%d]: %w", i, err)
		}
		if names[n.Name] {
			return nil, fmt.Errorf("nodes[%d]: name %q occurs twice", i, n.Name)
		}
		if n.EK != "" && eks[n.EK] {
			return nil, fmt.Errorf("nodes[%d]: ek occurs twice", i)
		}
		for j := range i {
			if n.SRK != nil && bytes.Equal(n.SRK, nodes[j].SRK) {
				return nil, fmt.Errorf("nodes[%d]: srk occurs twice", i)
			}
		}
		names[n.Name], eks[n.EK] = true, true
	}
	return names, nil
}

func (n *node2) check() error {
	if !nodeName.MatchString(n.Name) {
		return fmt.Errorf("malformed name")
	}
	if n.EK == "" && n.SRK == nil && n.EpochIndex == 0 {
		return nil
	}
	switch {
	case !ekDigest.MatchString(n.EK):
		return fmt.Errorf("malformed ek, want sha256: and 64 lower-case hexadecimal digits")
	case len(n.SRK) == 0 || len(n.SRK) > MaxSRK:
		return fmt.Errorf("srk has %d bytes, want 1 to %d", len(n.SRK), MaxSRK)
	case n.EpochIndex < FirstEpochIndex || n.EpochIndex > LastEpochIndex:
		return fmt.Errorf("epochIndex %#08x is not in the owner's range, %#08x to %#08x", n.EpochIndex, FirstEpochIndex, LastEpochIndex)
	}
	return nil
}
