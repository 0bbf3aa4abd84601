package keyring

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// New returns the first revision of a cluster's keyring. On success the Keyring
// owns kek.
func New(cluster seal.ClusterID, kek *seal.Secret, slots []seal.Slot, nodes []Node, now time.Time) (*Keyring, error) {
	doc := document{
		Format: format1, ClusterID: cluster, Nodes: slices.Clone(nodes),
		Current: slotted{KeyID: NewKeyID(cluster, kek), Created: newStamp(now), Slots: cloneSlots(slots)},
	}
	k, err := build(doc, nil, share(kek), nil)
	if err != nil {
		return nil, fmt.Errorf("make keyring: %w", err)
	}
	return k, nil
}

// Stage adds kek, wrapped in slots, as the staged KEK. Only one KEK is staged at a
// time: the error is an [*AlreadyStaged] if there is one. Other nodes may have
// acknowledged that KEK, so no other replaces it until it is activated or aborted. This
// node drives the rotation; see TakeOver. On success the new keyring owns kek.
func (k *Keyring) Stage(kek *seal.Secret, slots []seal.Slot, now time.Time) (*Keyring, error) {
	if s := k.doc.Staged; s != nil {
		return nil, &AlreadyStaged{KeyID: s.KeyID, By: s.By, Since: s.Created.Time}
	}
	doc := *k.doc
	doc.Staged = &slotted{KeyID: NewKeyID(doc.ClusterID, kek), Created: newStamp(now), By: driver(k), Slots: cloneSlots(slots)}
	next, err := build(doc, k.own, k.kek, share(kek))
	if err != nil {
		return nil, fmt.Errorf("stage KEK: %w", err)
	}
	return next, nil
}

// driver returns the name of the node that stages with k. Format 1 does not record it,
// because it has only one node.
func driver(k *Keyring) string {
	self, ok := k.Self()
	if !ok || k.doc.Format == format1 {
		return ""
	}
	return self.Name
}

// TakeOver returns the revision in which the node of k drives the rotation. It returns k
// itself if this node drives it already.
func TakeOver(k *Keyring) (*Keyring, error) {
	self, ok := k.Self()
	switch {
	case k.doc.Staged == nil:
		return nil, errNothingStaged
	case !ok || k.doc.Format != format2:
		return nil, errors.New("take over the rotation: the keyring is a single node's, or does not say which node this is")
	case k.doc.Staged.By == self.Name:
		return k, nil
	}
	doc, staged := *k.doc, *k.doc.Staged
	staged.By = self.Name
	doc.Staged = &staged
	return revise(k, "take over the rotation", &doc)
}

// WithStagedSlots returns the revision after k in which the staged KEK also has the slots
// more. The KEK must be open, and the caller has wrapped it in those slots.
func WithStagedSlots(k *Keyring, more []seal.Slot) (*Keyring, error) {
	if k.doc.Staged == nil {
		return nil, errNothingStaged
	}
	doc, staged := *k.doc, *k.doc.Staged
	staged.Slots = append(cloneSlots(staged.Slots), cloneSlots(more)...)
	doc.Staged = &staged
	return revise(k, "wrap the staged KEK again", &doc)
}

// AlreadyStaged says that no KEK can be staged because another one is staged.
type AlreadyStaged struct {
	KeyID seal.KeyID
	// By is the node that drives the rotation; "" in format 1.
	By    string
	Since time.Time
}

// Error names the staged KEK, the node that staged it, and the time since when it is staged.
func (e *AlreadyStaged) Error() string {
	by := ""
	if e.By != "" {
		by = " by node " + e.By
	}
	return fmt.Sprintf("key ID %s has been staged%s since %s; activate or abort it first", e.KeyID, by, e.Since.Format(stampLayout))
}

// OpenStaged returns a keyring that is k with its staged KEK open, so that it can
// decrypt under that KEK and activate it. kek was unwrapped from a staged slot. The
// revision stays the same. On success the new keyring owns kek.
func (k *Keyring) OpenStaged(kek *seal.Secret) (*Keyring, error) {
	if k.doc.Staged == nil {
		return nil, errNothingStaged
	}
	if got := NewKeyID(k.doc.ClusterID, kek); got != k.doc.Staged.KeyID {
		return nil, seal.Errorf(seal.CauseSlotCorrupt, hintRestore,
			"the slot holds the KEK of key ID %s, but the staged KEK has key ID %s", got, k.doc.Staged.KeyID)
	}
	next := &Keyring{raw: k.raw, body: k.body, mac: k.mac, doc: k.doc, own: k.own, kek: k.kek.retain(), current: k.current, seeds: maps.Clone(k.seeds)}
	addStaged(next, share(kek))
	return next, nil
}

var errNothingStaged = errors.New("no KEK is staged; run kleidi rotate")

// StagedID returns the key ID of the staged KEK, or "" if none is staged. Holds
// reports whether that KEK is open.
func (k *Keyring) StagedID() seal.KeyID {
	if k.doc.Staged == nil {
		return ""
	}
	return k.doc.Staged.KeyID
}

// Abort ends a rotation before it is activated: it retires the staged KEK, which must be
// open. Format 2 notes that the KEK was never current. The KEK stays readable because
// another node may have activated it already: a node that is ahead of this keyring after
// the store was restored from an older snapshot.
func (k *Keyring) Abort(now time.Time) (*Keyring, error) {
	doc, err := aborted(k, now)
	if err != nil {
		return nil, err
	}
	return revise(k, "abort", doc)
}

// aborted returns the document of k with the staged KEK retired.
func aborted(k *Keyring, now time.Time) (*document, error) {
	switch {
	case k.doc.Staged == nil:
		return nil, errNothingStaged
	case k.staged == nil:
		return nil, fmt.Errorf("abort: the staged KEK %s is not open here; abort on a node where it is", k.doc.Staged.KeyID)
	}
	doc := *k.doc
	doc.Staged, doc.Retired = nil, slices.Clone(doc.Retired)
	r := retired{KeyID: k.doc.Staged.KeyID, Created: k.doc.Staged.Created, Retired: newStamp(now), Unused: doc.Format >= format2}
	withKEK(k.kek.secret, func(current []byte) {
		withKEK(k.staged.secret, func(staged []byte) {
			r.Sealed = aead(current, labelRetired).Seal(nil, nil, staged, retiredAAD(doc.ClusterID, r.KeyID, doc.Current.KeyID))
		})
	})
	doc.Retired = append(doc.Retired, r)
	return &doc, nil
}

// HasRoom reports whether the keyring has room for a rotation. A rotation retires the
// current KEK, and the KEK that an interrupted rotation left staged, if any.
func (k *Keyring) HasRoom() bool {
	n := len(k.doc.Retired) + 1
	if k.staged != nil {
		n++
	}
	return n <= MaxRetired
}

// GiveUpStaged drops a staged KEK that does not open, and that Abort therefore can't
// retire. It is for a cluster of one node, whose anchor shows that the KEK was never
// announced, so that nothing is encrypted under it. With more nodes it fails, because
// another node may have activated the KEK.
func (k *Keyring) GiveUpStaged() (*Keyring, error) {
	switch {
	case k.doc.Staged == nil:
		return nil, errNothingStaged
	case k.staged != nil:
		return nil, errors.New("give up the staged KEK: it is open; abort retires it")
	case len(k.doc.Nodes) > 1:
		return nil, fmt.Errorf("give up the staged KEK %s: another node may use it; abort on a node where it is open", k.doc.Staged.KeyID)
	}
	doc := *k.doc
	doc.Staged = nil
	return revise(k, "give up the staged KEK", &doc)
}

// Activate retires the current KEK and makes the staged KEK the current one. It
// encrypts all retired KEKs under the new current KEK.
func (k *Keyring) Activate(now time.Time) (*Keyring, error) {
	if k.doc.Staged == nil || k.staged == nil {
		return nil, errNothingStaged
	}
	if !k.Acknowledged() {
		return nil, fmt.Errorf("activate KEK: this node has no slot of its own for %s yet", k.doc.Staged.KeyID)
	}
	doc := *k.doc
	doc.Current, doc.Staged = *k.doc.Staged, nil
	doc.Former = nil
	doc.Current.By = ""
	doc.Current.Slots = doc.Current.withoutImports(doc.Format)
	doc.Retired = nil
	if err := retireInto(k, &doc, newStamp(now)); err != nil {
		return nil, fmt.Errorf("activate KEK: %w", err)
	}
	next, err := build(doc, k.own, k.staged, nil)
	if err != nil {
		return nil, fmt.Errorf("activate KEK: %w", err)
	}
	return next, nil
}

// retireInto fills doc.Retired with all KEKs of k except the staged one.
func retireInto(k *Keyring, doc *document, now stamp) (err error) {
	withKEK(k.staged.secret, func(current []byte) {
		c := aead(current, labelRetired)
		reseal := func(r retired, old []byte) error {
			r.Sealed = c.Seal(nil, nil, old, retiredAAD(doc.ClusterID, r.KeyID, doc.Current.KeyID))
			doc.Retired = append(doc.Retired, r)
			return nil
		}
		withKEK(k.kek.secret, func(old []byte) {
			if err = k.doc.eachRetired(old, reseal); err == nil {
				err = reseal(retired{KeyID: k.doc.Current.KeyID, Created: k.doc.Current.Created, Retired: now}, old)
			}
		})
	})
	return err
}

// WithSlots replaces the slots of the current KEK.
func (k *Keyring) WithSlots(slots []seal.Slot) (*Keyring, error) {
	return k.WithNodes(k.doc.Nodes, slots)
}

// WithNodes replaces the nodes and the slots of the current KEK. In format 2 the slots of
// this node are in the node's own section, and a change of that section alone keeps the
// revision. WithNode and WithoutNode add and remove nodes in format 2.
func (k *Keyring) WithNodes(nodes []Node, slots []seal.Slot) (*Keyring, error) {
	doc, own := *k.doc, k.own
	doc.Nodes, doc.Current.Slots = slices.Clone(nodes), cloneSlots(slots)
	if k.doc.Format == format2 {
		if !slices.EqualFunc(nodes, k.doc.Nodes, Node.SameTPM) {
			return nil, errors.New("replace slots: the nodes differ from those in the keyring")
		}
		doc.Nodes = k.doc.Nodes
		var err error
		if own, err = k.own.splitFrom(&doc); err != nil {
			return nil, fmt.Errorf("replace slots: %w", err)
		}
		if same, err := sameBody(k, &doc); same || err != nil {
			return withSection(k, own, err)
		}
	}
	next, err := build(doc, own, k.kek, k.staged)
	if err != nil {
		return nil, fmt.Errorf("replace slots: %w", err)
	}
	return next, nil
}

// AtLeast raises the revision by one, or to revision if that is higher. It serves to
// raise the revision of a restored keyring above the one that the nodes anchored.
func (k *Keyring) AtLeast(revision uint64) (*Keyring, error) {
	doc := *k.doc
	if revision > 0 {
		doc.Revision = max(doc.Revision, revision-1)
	}
	return revise(k, "raise revision", &doc)
}

// build returns the keyring of doc's next revision, with the remaining part of the node's
// own section. The keyring shares kek, and staged unless it is nil or doc stages no KEK.
func build(doc document, own *section2, kek, staged *shared) (*Keyring, error) {
	doc.Revision++
	if doc.Staged == nil {
		staged = nil
	}
	body, err := encodeBody(&doc)
	if err != nil {
		return nil, err
	}
	return assemble(body, own.beside(&doc), kek, staged)
}

// assemble makes the keyring of a body and the node's own section, which may be nil. It
// parses and opens its own result, so that it never writes a keyring that Parse or Open
// would refuse.
func assemble(body []byte, own *section2, kek, staged *shared) (*Keyring, error) {
	e := envelope{Body: body}
	if own != nil {
		var err error
		if e.Section, err = encode(own); err != nil {
			return nil, err
		}
	}
	var k *Keyring
	err := fmt.Errorf("the KEK is closed or not of %d bytes", seal.KEKSize)
	withKEK(kek.secret, func(b []byte) { k, err = write(e, b) })
	if err != nil {
		return nil, err
	}
	k.kek = kek.retain()
	addStaged(k, staged)
	return k, nil
}

func write(e envelope, kek []byte) (*Keyring, error) {
	e.MAC = bodyMAC(kek, e.Body)
	if e.Section != nil {
		e.SectionMAC = sectionMAC(kek, e.Section)
	}
	file, err := encode(e)
	if err != nil {
		return nil, err
	}
	u, err := parse(append(file, '\n'))
	if err != nil {
		return nil, err
	}
	k := newOpen(u)
	return k, u.open(k, kek)
}

func addStaged(k *Keyring, staged *shared) {
	if staged == nil {
		return
	}
	k.staged = staged.retain()
	withKEK(staged.secret, func(b []byte) { addSeeds(k, k.doc.Staged.KeyID, newSeedCipher(k.doc.ClusterID, k.doc.Staged.KeyID, b)) })
}
