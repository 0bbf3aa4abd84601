package keyring

import (
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/seal"
)

// section2 is a node's own section in format 2: the slots that only this node writes and
// needs. It stays on the node. Its members are stored in this order.
type section2 struct {
	Format    int            `json:"format"`
	ClusterID seal.ClusterID `json:"clusterID"`
	Node      string         `json:"node"`
	KeyID     seal.KeyID     `json:"keyID"` // key ID of the KEK whose MAC covers the section
	Slots     []ownSlot      `json:"slots,omitempty"`
}

// ownSlot is a slot of the node's own section, and the key ID of the KEK in it: the
// current KEK or, once the node has acknowledged it, the staged KEK.
type ownSlot struct {
	KeyID seal.KeyID `json:"keyID"`
	Slot  seal.Slot  `json:"slot"`
}

// parseSection2 reads a node's own section and checks everything that can be checked
// without the shared keyring.
func parseSection2(b []byte) (*section2, error) {
	s := new(section2)
	if err := decode(b, s); err != nil {
		return nil, err
	}
	return s, s.check()
}

func (s *section2) check() error {
	switch {
	case s.Format != format2:
		return fmt.Errorf("format is %d, want %d", s.Format, format2)
	case !nodeName.MatchString(s.Node):
		return fmt.Errorf("malformed node name")
	case !validKeyID(s.KeyID):
		return fmt.Errorf("malformed key ID")
	}
	count := map[seal.KeyID]int{}
	for i, o := range s.Slots {
		if !validKeyID(o.KeyID) {
			return fmt.Errorf("slots[%d]: malformed key ID", i)
		}
		if o.Slot.Node != s.Node {
			return fmt.Errorf("slots[%d]: it is for node %.64q, the section is of node %q", i, o.Slot.Node, s.Node)
		}
		if err := checkSlot(o.Slot, map[string]bool{s.Node: true}); err != nil {
			return fmt.Errorf("slots[%d]: %w", i, err)
		}
		if count[o.KeyID]++; count[o.KeyID] > MaxSlots {
			return fmt.Errorf("more than %d slots of key ID %s", MaxSlots, o.KeyID)
		}
	}
	return nil
}

// checkBeside refuses a section that does not belong to the shared keyring beside it.
func (s *section2) checkBeside(b *document) error {
	known := map[seal.KeyID]bool{b.Current.KeyID: true}
	if b.Staged != nil {
		known[b.Staged.KeyID] = true
	}
	switch {
	case s.ClusterID != b.ClusterID:
		return fmt.Errorf("it is of cluster %s, the shared keyring of cluster %s", s.ClusterID, b.ClusterID)
	case s.KeyID != b.Current.KeyID:
		return fmt.Errorf("key ID %s covers it, the current one is %s", s.KeyID, b.Current.KeyID)
	case b.node(s.Node) == nil:
		return fmt.Errorf("node %q is not among the nodes", s.Node)
	}
	for i, o := range s.Slots {
		if !known[o.KeyID] {
			return fmt.Errorf("slots[%d]: key ID %s is neither current nor staged", i, o.KeyID)
		}
	}
	return nil
}

// of returns the slots of one KEK. A nil section has none.
func (s *section2) of(id seal.KeyID) (slots []seal.Slot) {
	if s == nil {
		return nil
	}
	for _, o := range s.Slots {
		if o.KeyID == id {
			slots = append(slots, o.Slot)
		}
	}
	return cloneSlots(slots)
}

// with returns the section with the given slots in place of one KEK's former slots. The
// slots of other KEKs come first.
func (s *section2) with(id seal.KeyID, slots []seal.Slot) *section2 {
	next := *s
	next.Slots = slices.DeleteFunc(slices.Clone(s.Slots), func(o ownSlot) bool { return o.KeyID == id })
	for _, slot := range cloneSlots(slots) {
		next.Slots = append(next.Slots, ownSlot{KeyID: id, Slot: slot})
	}
	return &next
}

// beside returns the section as it stands beside a shared keyring: covered by its
// current KEK, and without slots of KEKs other than the current and the staged one.
func (s *section2) beside(d *document) *section2 {
	if s == nil {
		return nil
	}
	next := *s
	next.KeyID = d.Current.KeyID
	next.Slots = slices.DeleteFunc(slices.Clone(s.Slots), func(o ownSlot) bool {
		return o.KeyID != d.Current.KeyID && (d.Staged == nil || o.KeyID != d.Staged.KeyID)
	})
	return &next
}

// viewOf returns all slots of a KEK, first those of the node's own section. A nil KEK has
// no slots.
func viewOf(s *slotted, own *section2) []seal.Slot {
	if s == nil {
		return nil
	}
	return append(own.of(s.KeyID), cloneSlots(s.Slots)...)
}

func sectionMAC(kek, section []byte) (sum []byte) {
	derive(kek, labelSection, func(key []byte) { sum = mac(key, section) })
	return sum
}
