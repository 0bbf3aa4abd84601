package keyring

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"time"
	"unicode/utf8"

	"github.com/beezy-dev/kleidi/seal"
	kjson "sigs.k8s.io/json"
)

// Limits of format 1, for reading and for writing.
const (
	// MaxSize is the maximum size of a keyring in bytes; etcd takes 1.5 MiB.
	MaxSize = 1 << 20
	// MaxSlots is the maximum number of slots of one KEK for one node, and for no
	// particular node.
	MaxSlots = 16
	// MaxRetired is the maximum number of retired KEKs.
	MaxRetired = 256
	// MaxNodes is the maximum number of nodes.
	MaxNodes = 64
	// MaxRevision is the largest integer that every JSON reader represents exactly.
	MaxRevision = 1<<53 - 1
)

const format1 = 1

// envelope is the stored document. Only a node's file has the node's own section, and only
// in format 2.
type envelope struct {
	Body       []byte `json:"body"`
	MAC        []byte `json:"mac"`
	Section    []byte `json:"section,omitempty"`
	SectionMAC []byte `json:"sectionMAC,omitempty"`
}

// body1 is the body of format 1. The order of the members is part of the format.
type body1 struct {
	Format    int            `json:"format"`
	ClusterID seal.ClusterID `json:"clusterID"`
	Revision  uint64         `json:"revision"`
	Current   slotted        `json:"current"`
	Staged    *slotted       `json:"staged,omitempty"`
	Retired   []retired1     `json:"retired,omitempty"`
	Nodes     []node1        `json:"nodes,omitempty"`
}

// retired1 is a retired KEK, encrypted under the current one. The body lists them in the
// order in which they retired.
type retired1 struct {
	KeyID   seal.KeyID `json:"keyID"`
	Created stamp      `json:"created"`
	Retired stamp      `json:"retired"`
	Sealed  []byte     `json:"sealed"`
}

// node1 is a control-plane machine. EK is empty for a machine without a TPM.
type node1 struct {
	Name string `json:"name"`
	EK   string `json:"ek,omitempty"`
}

// stamp is a time in whole seconds, RFC 3339, UTC.
type stamp struct{ time.Time }

const stampLayout = "2006-01-02T15:04:05Z"

func newStamp(t time.Time) stamp { return stamp{t.UTC().Truncate(time.Second)} }

func (s stamp) MarshalJSON() ([]byte, error) { return []byte(`"` + s.Format(stampLayout) + `"`), nil }

func (s *stamp) UnmarshalJSON(b []byte) (err error) {
	s.Time, err = time.Parse(`"`+stampLayout+`"`, string(b))
	return err
}

// encode returns the canonical encoding of v: no white space, members in the order of
// the struct, and no escape that JSON does not require.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// decode parses the result of encode. It accepts no other form: no unknown, duplicate or
// differently spelled member, no white space, no other base64 encoding of the same bytes,
// no trailing bytes.
func decode(b []byte, v any) error {
	if !utf8.Valid(b) {
		return fmt.Errorf("not UTF-8")
	}
	strict, err := kjson.UnmarshalStrict(b, v)
	if err == nil && len(strict) > 0 {
		err = strict[0]
	}
	if err != nil {
		return clip(err)
	}
	again, err := encode(v)
	if err != nil {
		return err
	}
	if !bytes.Equal(again, b) {
		return fmt.Errorf("not in canonical form")
	}
	return nil
}

// clip shortens the error of a decoder, which quotes its input.
func clip(err error) error { return fmt.Errorf("%.160q", err.Error()) }

// parseBody1 parses a body of format 1 and makes every check that needs no KEK.
func parseBody1(b []byte) (*body1, error) {
	body := new(body1)
	if err := decode(b, body); err != nil {
		return nil, err
	}
	return body, body.check()
}

func (b *body1) check() error {
	if b.Format != format1 {
		return fmt.Errorf("format is %d, want %d", b.Format, format1)
	}
	if b.Revision == 0 || b.Revision > MaxRevision {
		return fmt.Errorf("revision %d is not between 1 and %d", b.Revision, uint64(MaxRevision))
	}
	nodes, err := checkNodes(b.Nodes)
	if err != nil {
		return err
	}
	if err := b.Current.check(nodes); err != nil {
		return fmt.Errorf("current: %w", err)
	}
	if b.Staged != nil {
		if err := b.Staged.check(nodes); err != nil {
			return fmt.Errorf("staged: %w", err)
		}
	}
	return b.checkRetired()
}

func (b *body1) checkRetired() error {
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

func (s *slotted) check(nodes map[string]bool) error {
	if !validKeyID(s.KeyID) {
		return fmt.Errorf("malformed key ID")
	}
	if len(s.Slots) == 0 {
		return fmt.Errorf("no slots")
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

var (
	slotType = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)
	nodeName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?$`)
	ekDigest = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
)

func checkSlot(s seal.Slot, nodes map[string]bool) error {
	switch {
	case !slotType.MatchString(s.Type):
		return fmt.Errorf("malformed type")
	case s.Node != "" && !nodes[s.Node]:
		return fmt.Errorf("node %q is not among the nodes", s.Node)
	case len(s.Data) > seal.MaxSlotData:
		return fmt.Errorf("data has %d bytes, at most %d", len(s.Data), seal.MaxSlotData)
	case len(s.Data) == 0 || s.Data[0] != '{':
		return fmt.Errorf("data is not a JSON object")
	}
	return nil
}

func checkNodes(nodes []node1) (map[string]bool, error) {
	if len(nodes) > MaxNodes {
		return nil, fmt.Errorf("%d nodes, at most %d", len(nodes), MaxNodes)
	}
	names, eks := map[string]bool{}, map[string]bool{}
	for i, n := range nodes {
		switch {
		case !nodeName.MatchString(n.Name):
			return nil, fmt.Errorf("nodes[%d]: malformed name", i)
		case names[n.Name]:
			return nil, fmt.Errorf("nodes[%d]: name %q occurs twice", i, n.Name)
		case n.EK != "" && !ekDigest.MatchString(n.EK):
			return nil, fmt.Errorf("nodes[%d]: malformed ek, want sha256: and 64 lower-case hexadecimal digits", i)
		case n.EK != "" && eks[n.EK]:
			return nil, fmt.Errorf("nodes[%d]: ek occurs twice", i)
		}
		names[n.Name], eks[n.EK] = true, true
	}
	return names, nil
}
