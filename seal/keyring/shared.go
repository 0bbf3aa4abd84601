package keyring

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// Format 2: all nodes share a keyring, except for each node's own section.

// Formats are the formats that this version reads.
func Formats() []int { return []int{format1, format2} }

// Format returns the format of the keyring.
func (k *Keyring) Format() int { return k.doc.Format }

// Shared returns the part of a format 2 keyring that the cluster store holds: body and
// MAC, without the node's own section. It is nil in format 1, whose slots belong to one
// node.
func (k *Keyring) Shared() []byte {
	if k.doc.Format != format2 {
		return nil
	}
	b, err := encode(envelope{Body: k.body, MAC: k.mac})
	if err != nil {
		panic(fmt.Sprintf("encode keyring: %v", err)) // bytes always encode
	}
	return append(b, '\n')
}

// Self returns this node's entry: the entry that the node's own section names or, in
// format 1, the only entry.
func (k *Keyring) Self() (Node, bool) {
	if k.own != nil {
		return *k.doc.node(k.own.Node), true
	}
	if k.doc.Format == format1 && len(k.doc.Nodes) == 1 {
		return k.doc.Nodes[0], true
	}
	return Node{}, false
}

// OwnSlots returns the slots of the current KEK in the node's own section.
func (k *Keyring) OwnSlots() []seal.Slot { return k.own.of(k.doc.Current.KeyID) }

// OwnStagedSlots returns the slots of the staged KEK in the node's own section.
func (k *Keyring) OwnStagedSlots() []seal.Slot { return k.own.of(k.StagedID()) }

// Acknowledged reports whether this node could start once the staged KEK is current.
// In format 2 a node that has own slots for the current KEK needs own slots for the staged
// one. In format 1 all slots are staged with the KEK.
func (k *Keyring) Acknowledged() bool {
	return k.doc.Staged != nil && (len(k.OwnSlots()) == 0 || len(k.OwnStagedSlots()) > 0)
}

// Upgrade returns the next revision in format 2, committed in the file of self, which
// must be the only node. The slots of that node become the node's own section. No
// rotation may be going on.
func (k *Keyring) Upgrade(self Node) (*Keyring, error) {
	switch only, ok := k.Self(); {
	case k.doc.Format != format1:
		return nil, fmt.Errorf("upgrade keyring: it is of format %d", k.doc.Format)
	case k.doc.Staged != nil:
		return nil, fmt.Errorf("upgrade keyring: key ID %s is staged; activate or abort it first", k.doc.Staged.KeyID)
	case !ok || only.Name != self.Name || only.EK != self.EK:
		return nil, fmt.Errorf("upgrade keyring: node %s is not its only node", self.Name)
	}
	doc := *k.doc
	doc.Format, doc.Commit, doc.Seat, doc.Nodes = format2, CommitLocal, self.Name, []Node{self}
	own := &section2{Format: format2, ClusterID: doc.ClusterID, Node: self.Name}
	own, err := own.splitFrom(&doc)
	if err != nil {
		return nil, fmt.Errorf("upgrade keyring: %w", err)
	}
	next, err := build(doc, own, k.kek, nil)
	if err != nil {
		return nil, fmt.Errorf("upgrade keyring: %w", err)
	}
	return next, nil
}

// OnNode returns the shared keyring with the own section of a node, as the node keeps both
// in its file after it has joined. The slots are those of the current and of the staged
// KEK. The revision stays.
func (k *Keyring) OnNode(name string, current, staged []seal.Slot) (*Keyring, error) {
	if k.doc.Format != format2 || k.doc.node(name) == nil {
		return nil, fmt.Errorf("own section: node %s is not in a keyring of format %d", name, format2)
	}
	own := &section2{Format: format2, ClusterID: k.doc.ClusterID, Node: name}
	return withOwnSlots(k, own, current, staged)
}

// WithOwnSlots replaces the slots of the node's own section. The revision stays.
func (k *Keyring) WithOwnSlots(current, staged []seal.Slot) (*Keyring, error) {
	if k.own == nil {
		return nil, errors.New("own section: the keyring has none")
	}
	return withOwnSlots(k, k.own, current, staged)
}

func withOwnSlots(k *Keyring, own *section2, current, staged []seal.Slot) (*Keyring, error) {
	own = own.with(k.doc.Current.KeyID, current)
	if k.doc.Staged != nil {
		own = own.with(k.doc.Staged.KeyID, staged)
	} else if len(staged) > 0 {
		return nil, fmt.Errorf("own section: %w", errNothingStaged)
	}
	return withSection(k, own, nil)
}

// withSection returns the same shared keyring with another own section; err passes
// through.
func withSection(k *Keyring, own *section2, err error) (*Keyring, error) {
	if err != nil {
		return nil, err
	}
	next, err := assemble(k.body, own.beside(k.doc), k.kek, k.staged)
	if err != nil {
		return nil, fmt.Errorf("own section: %w", err)
	}
	return next, nil
}

// splitFrom takes the slots of the section's node out of doc's current KEK, and returns
// the section with them.
func (s *section2) splitFrom(doc *document) (*section2, error) {
	var own, common []seal.Slot
	for _, slot := range doc.Current.Slots {
		switch {
		case slot.Node == "":
			common = append(common, slot)
		case s != nil && slot.Node == s.Node:
			own = append(own, slot)
		default:
			return nil, fmt.Errorf("a %s slot of node %.64q, which only that node can keep", slot.Type, slot.Node)
		}
	}
	doc.Current.Slots = common
	if s == nil {
		return nil, nil
	}
	return s.with(doc.Current.KeyID, own), nil
}

// sameBody reports whether doc encodes to the keyring's body.
func sameBody(k *Keyring, doc *document) (bool, error) {
	b, err := encodeBody(doc)
	return bytes.Equal(b, k.body), err
}

// withoutImports returns the slots that remain when a staged KEK becomes current. In
// format 1 a node's slot is no import slot.
func (s *slotted) withoutImports(format int) []seal.Slot {
	if format == format1 {
		return s.Slots
	}
	return slices.DeleteFunc(slices.Clone(s.Slots), func(slot seal.Slot) bool { return slot.Node != "" })
}

// WithNode adds a node, or replaces the entry of that name. If the entry was another
// machine's, the keyring names that machine as a former node, as WithoutNode does. That
// machine may know a staged KEK too, so WithNode then retires the staged KEK, as Abort does.
// Only the entry of this node itself can be replaced while the staged KEK is not open here,
// because a node with a new TPM may be unable to open it.
func (k *Keyring) WithNode(n Node, now time.Time) (*Keyring, error) {
	n.Added = now
	what, from := "add node "+n.Name, k.doc
	before := from.node(n.Name)
	replaced := before != nil && before.EK != n.EK
	if self, _ := k.Self(); replaced && from.Staged != nil && (k.staged != nil || n.Name != self.Name) {
		var err error
		if from, err = aborted(k, now); err != nil {
			return nil, fmt.Errorf("%s in the place of another machine, which may know the staged KEK: %w", what, err)
		}
	}
	doc, err := changeNodes(&Keyring{doc: from, own: k.own}, what, func(nodes []Node) []Node { return append(nodes, n) }, n.Name)
	if err != nil {
		return nil, err
	}
	if replaced {
		doc.addFormer(n.Name)
	}
	return revise(k, what, doc)
}

// WithoutNode removes other nodes in one revision, with their import slots. The keyring names
// them as former nodes until another KEK is current: they know this one. They may know a
// staged KEK too, so the caller aborts it first.
func (k *Keyring) WithoutNode(names ...string) (*Keyring, error) {
	what := "remove node " + strings.Join(names, ", ")
	doc := k.doc
	for _, name := range names {
		switch self, _ := k.Self(); {
		case k.doc.node(name) == nil:
			return nil, fmt.Errorf("remove node %.64s: there is no such node", name)
		case self.Name == name:
			return nil, fmt.Errorf("remove node %s: this is that node; run it on another one", name)
		}
		var err error
		if doc, err = changeNodes(&Keyring{doc: doc, own: k.own}, what, func(nodes []Node) []Node { return nodes }, name); err != nil {
			return nil, err
		}
		doc.addFormer(name)
	}
	return revise(k, what, doc)
}

func (b *document) addFormer(name string) {
	if i, known := slices.BinarySearch(b.Former, name); !known && len(b.Former) < MaxNodes {
		b.Former = slices.Insert(slices.Clone(b.Former), i, name)
	}
}

// changeNodes returns the document without the node named without, and with the list of
// nodes that add returns.
func changeNodes(k *Keyring, what string, add func([]Node) []Node, without string) (*document, error) {
	if k.doc.Format != format2 {
		return nil, fmt.Errorf("%s: a keyring of format %d is of one node", what, k.doc.Format)
	}
	doc := *k.doc
	doc.Nodes = add(slices.DeleteFunc(slices.Clone(doc.Nodes), func(n Node) bool { return n.Name == without }))
	if doc.Staged != nil {
		staged := *doc.Staged
		staged.Slots = slices.DeleteFunc(slices.Clone(staged.Slots), func(s seal.Slot) bool { return s.Node == without })
		if doc.node(staged.By) == nil {
			staged.By = driver(k) // the driver was removed: this node takes over
		}
		doc.Staged = &staged
	}
	return &doc, nil
}

// InCluster returns the revision from which on a change counts as made once it is in the
// cluster store. There is no way back.
func (k *Keyring) InCluster() (*Keyring, error) {
	if k.doc.Format != format2 || k.doc.Commit != CommitLocal {
		return nil, errors.New("hand over to the cluster store: the keyring is not committed by a node with the seat")
	}
	doc := *k.doc
	doc.Commit, doc.Seat = CommitCluster, ""
	return revise(k, "hand over to the cluster store", &doc)
}

// Prune removes a retired KEK. Nothing under it can be read any longer: the caller
// has proof that nothing is stored under it, and has archived the KEK.
func (k *Keyring) Prune(id seal.KeyID) (*Keyring, error) {
	doc := *k.doc
	doc.Retired = slices.DeleteFunc(slices.Clone(doc.Retired), func(r retired) bool { return r.KeyID == id })
	if len(doc.Retired) == len(k.doc.Retired) {
		return nil, fmt.Errorf("prune: key ID %s is not that of a retired KEK", id)
	}
	return revise(k, "prune", &doc)
}

func revise(k *Keyring, what string, doc *document) (*Keyring, error) {
	next, err := build(*doc, k.own, k.kek, k.staged)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return next, nil
}

// JoinDone returns the 32 bytes that end a join: an HMAC of the join's transcript under
// the current KEK. It proves to the node that gave the KEK that the new node has opened
// it. The result is nil on a closed keyring.
func (k *Keyring) JoinDone(transcript []byte) (sum []byte) {
	withKEK(k.kek.secret, func(kek []byte) {
		derive(kek, labelJoinDone, func(key []byte) { sum = mac(key, transcript) })
	})
	return sum
}

// withHeld calls f with the KEK of a key ID: the current one, the staged one if it is
// open, or a retired one. It reports whether it called f.
func withHeld(k *Keyring, id seal.KeyID, f func(kek []byte)) (called bool) {
	switch {
	case id == "":
		return false
	case id == k.CurrentID():
		return withKEK(k.kek.secret, f)
	case id == k.StagedID():
		return k.staged != nil && withKEK(k.staged.secret, f)
	}
	i := slices.IndexFunc(k.doc.Retired, func(r retired) bool { return r.KeyID == id })
	if i < 0 {
		return false
	}
	withKEK(k.kek.secret, func(kek []byte) {
		err := k.doc.openRetired(k.doc.Retired[i:i+1], kek, func(_ retired, old []byte) error {
			f(old)
			return nil
		})
		called = err == nil
	})
	return called
}
