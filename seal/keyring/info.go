package keyring

import (
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// Info describes a keyring for display. It holds no secret.
type Info struct {
	ClusterID seal.ClusterID `json:"clusterID"`
	Revision  uint64         `json:"revision"`
	Commit    Commit         `json:"commit,omitempty"` // of format 2
	Seat      string         `json:"seat,omitempty"`
	Current   KEKInfo        `json:"current"`
	Staged    *KEKInfo       `json:"staged,omitempty"`
	Retired   []RetiredInfo  `json:"retired"`
	Nodes     []Node         `json:"nodes"`
	// Former are the removed nodes that know the current KEK, and the names under which
	// another machine knew it before. A rotation ends that.
	Former []string `json:"former,omitempty"`
}

// KEKInfo describes a KEK in slots.
type KEKInfo struct {
	KeyID   seal.KeyID `json:"keyID"`
	Created time.Time  `json:"created"`
	// By is the node that drives the rotation to a staged KEK.
	By    string     `json:"by,omitempty"`
	Slots []SlotInfo `json:"slots"`
}

// SlotInfo describes a slot.
type SlotInfo struct {
	Type string `json:"type"`
	Node string `json:"node,omitempty"`
}

// RetiredInfo describes a retired KEK.
type RetiredInfo struct {
	KeyID   seal.KeyID `json:"keyID"`
	Created time.Time  `json:"created"`
	Retired time.Time  `json:"retired"`
	// Unused says that the KEK was staged and never current. Format 1 does not record it.
	Unused bool `json:"unused,omitempty"`
}

func (b *document) info(own *section2) Info {
	i := Info{
		ClusterID: b.ClusterID, Revision: b.Revision, Commit: b.Commit, Seat: b.Seat, Current: b.Current.info(own),
		Retired: []RetiredInfo{}, Nodes: append([]Node{}, b.Nodes...), Former: b.Former,
	}
	if b.Staged != nil {
		staged := b.Staged.info(own)
		i.Staged = &staged
	}
	for _, r := range b.Retired {
		i.Retired = append(i.Retired, RetiredInfo{KeyID: r.KeyID, Created: r.Created.Time, Retired: r.Retired.Time, Unused: r.Unused})
	}
	return i
}

func (s *slotted) info(own *section2) KEKInfo {
	i := KEKInfo{KeyID: s.KeyID, Created: s.Created.Time, By: s.By, Slots: []SlotInfo{}}
	for _, slot := range viewOf(s, own) {
		i.Slots = append(i.Slots, SlotInfo{Type: slot.Type, Node: slot.Node})
	}
	return i
}
