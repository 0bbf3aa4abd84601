package keyring

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// document is the body of a keyring, in any format. A member that format 1 lacks is empty
// there. The stored forms are in format1.go and format2.go.
type document struct {
	Format    int
	ClusterID seal.ClusterID
	Revision  uint64
	Commit    Commit
	Seat      string
	Current   slotted
	Staged    *slotted
	Retired   []retired
	Nodes     []Node
	Former    []string
}

// slotted is a KEK that is held in slots. Format 1 stores all of the slots together;
// format 2 stores some of them in the node's own section.
type slotted struct {
	KeyID   seal.KeyID  `json:"keyID"`
	Created stamp       `json:"created"`
	By      string      `json:"-"` // of a staged KEK: the node that drives the rotation; format 1 is of one node
	Slots   []seal.Slot `json:"slots"`
}

// retired is a KEK that is encrypted under the current one.
type retired struct {
	KeyID   seal.KeyID
	Created stamp
	Retired stamp
	Unused  bool
	Sealed  []byte
}

// Node is a control-plane machine.
type Node struct {
	// Name is its Kubernetes node name.
	Name string `json:"name"`
	// EK is "sha256:" and the hexadecimal digest of the endorsement key's SPKI
	// DER. It is empty for a node that has no TPM.
	EK string `json:"ek,omitempty"`
	// SRK is the public area (TPMT_PUBLIC) of its storage root key. Format 1 has none.
	SRK []byte `json:"srk,omitempty"`
	// EpochIndex is the NV index of its epoch counter. Format 1 has none.
	EpochIndex uint32 `json:"epochIndex,omitempty"`
	// Added is when the node was added. Format 1 does not say.
	Added time.Time `json:"added,omitzero"`
}

// SameTPM reports whether two entries describe one machine.
func (n Node) SameTPM(other Node) bool {
	return n.Name == other.Name && n.EK == other.EK && n.EpochIndex == other.EpochIndex && bytes.Equal(n.SRK, other.SRK)
}

// parseBody reads a body of any format that this version knows. It reads the format
// first, because the format decides how to read the rest.
func parseBody(b []byte) (*document, error) {
	format, err := formatOf(b)
	if err != nil {
		return nil, err
	}
	switch format {
	case format1:
		body, err := parseBody1(b)
		if err != nil {
			return nil, fmt.Errorf("body: %w", err)
		}
		return body.document(), nil
	case format2:
		body, err := parseBody2(b)
		if err != nil {
			return nil, fmt.Errorf("body: %w", err)
		}
		return body.document(), nil
	}
	return nil, fmt.Errorf("%w %d, this version reads %d and %d", ErrNewerFormat, format, format1, format2)
}

// formatOf reads only the format. A stored body begins with it, and parsing the
// rest refuses a second one.
func formatOf(body []byte) (int, error) {
	for _, format := range []int{format1, format2} {
		if bytes.HasPrefix(body, fmt.Appendf(nil, `{"format":%d,`, format)) {
			return format, nil
		}
	}
	var peek struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(body, &peek); err != nil {
		return 0, fmt.Errorf("body: %w", clip(err))
	}
	return peek.Format, nil
}

// encodeBody returns the body as it is stored.
func encodeBody(d *document) ([]byte, error) {
	if d.Format == format2 {
		return encode(newBody2(d))
	}
	return encode(newBody1(d))
}

// node returns the entry of a node, or nil.
func (b *document) node(name string) *Node {
	i := slices.IndexFunc(b.Nodes, func(n Node) bool { return n.Name == name })
	if i < 0 {
		return nil
	}
	return &b.Nodes[i]
}

func (b *body1) document() *document {
	d := &document{Format: b.Format, ClusterID: b.ClusterID, Revision: b.Revision, Current: b.Current, Staged: b.Staged}
	for _, r := range b.Retired {
		d.Retired = append(d.Retired, retired{KeyID: r.KeyID, Created: r.Created, Retired: r.Retired, Sealed: r.Sealed})
	}
	for _, n := range b.Nodes {
		d.Nodes = append(d.Nodes, Node{Name: n.Name, EK: n.EK})
	}
	return d
}

func newBody1(d *document) *body1 {
	b := &body1{Format: d.Format, ClusterID: d.ClusterID, Revision: d.Revision, Current: d.Current, Staged: d.Staged}
	for _, r := range d.Retired {
		b.Retired = append(b.Retired, retired1{r.KeyID, r.Created, r.Retired, r.Sealed})
	}
	for _, n := range d.Nodes {
		b.Nodes = append(b.Nodes, node1{n.Name, n.EK})
	}
	return b
}

func (b *body2) document() *document {
	d := &document{Format: b.Format, ClusterID: b.ClusterID, Revision: b.Revision, Commit: b.Commit, Seat: b.Seat, Current: slotted(b.Current)}
	if b.Staged != nil {
		staged := slotted(*b.Staged)
		d.Staged = &staged
	}
	for _, r := range b.Retired {
		d.Retired = append(d.Retired, retired(r))
	}
	for _, n := range b.Nodes {
		d.Nodes = append(d.Nodes, Node{Name: n.Name, EK: n.EK, SRK: n.SRK, EpochIndex: n.EpochIndex, Added: n.Added.Time})
	}
	d.Former = b.Former
	return d
}

func newBody2(d *document) *body2 {
	b := &body2{Format: d.Format, ClusterID: d.ClusterID, Revision: d.Revision, Commit: d.Commit, Seat: d.Seat, Current: slotted2(d.Current)}
	if d.Staged != nil {
		staged := slotted2(*d.Staged)
		b.Staged = &staged
	}
	for _, r := range d.Retired {
		b.Retired = append(b.Retired, retired2(r))
	}
	for _, n := range d.Nodes {
		b.Nodes = append(b.Nodes, node2{n.Name, n.EK, n.SRK, n.EpochIndex, newStamp(n.Added)})
	}
	b.Former = d.Former
	return b
}
