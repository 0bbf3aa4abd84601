package keyring

import (
	"bytes"
	"fmt"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// To end a fork, an operator has one keyring retire the KEKs of the other. The nodes that
// hold the other keyring then take the first.

// OpenHeld opens a keyring whose current KEK k holds, even if k has left it or never used it.
// It proves only who could have made remote.
func OpenHeld(k *Keyring, remote *Untrusted, mem seal.Memory) (*Keyring, error) {
	if err := checkComparable(k, remote); err != nil {
		return nil, err
	}
	var kek *seal.Secret
	var err error
	if !withHeld(k, remote.CurrentID(), func(b []byte) { kek, err = mem.Take(bytes.Clone(b)) }) {
		return nil, seal.Errorf(seal.CauseAnchor, hintForged, "the keyring of revision %d is under key ID %s, which this node does not hold", remote.Revision(), remote.CurrentID())
	}
	if err != nil {
		return nil, err
	}
	other, err := remote.Open(kek, nil)
	if err != nil {
		kek.Close()
	}
	return other, err
}

// Absorb returns a revision after both k and other, a keyring of the same cluster. It is
// k with the KEKs that only other holds as retired KEKs, so that no KEK is forgotten. It
// names the machines that know k's current KEK by other alone as former nodes. If they know
// the staged KEK too, that KEK is retired, and never becomes current.
func Absorb(k, other *Keyring, now time.Time) (*Keyring, error) {
	if s := other.doc.Staged; s != nil && other.staged == nil && !holdsOrStages(k, s.KeyID) {
		return nil, fmt.Errorf("absorb: the other keyring's staged KEK %s is not open here", s.KeyID)
	}
	holders := holdersBeside(k, other)
	if id := k.StagedID(); len(holders) > 0 && id != "" && holdsOrStages(other, id) {
		aborted, err := k.Abort(now)
		if err != nil {
			return nil, fmt.Errorf("absorb: node %s, which only the other keyring names, may know the staged KEK: %w", holders[0], err)
		}
		defer aborted.Close()
		k = aborted
	}
	doc := *k.doc
	for _, name := range holders {
		doc.addFormer(name)
	}
	doc.Revision, doc.Retired = max(doc.Revision, other.doc.Revision), slices.Clone(doc.Retired)
	var err error
	withKEK(k.kek.secret, func(current []byte) {
		c := aead(current, labelRetired)
		take := func(r retired, kek []byte) error {
			if !holdsOrStages(k, r.KeyID) {
				r.Sealed = c.Seal(nil, nil, kek, retiredAAD(doc.ClusterID, r.KeyID, doc.Current.KeyID))
				doc.Retired = append(doc.Retired, r)
			}
			return nil
		}
		withKEK(other.kek.secret, func(kek []byte) {
			if err = other.doc.eachRetired(kek, take); err == nil {
				err = take(retired{KeyID: other.doc.Current.KeyID, Created: other.doc.Current.Created, Retired: newStamp(now)}, kek)
			}
		})
		if s := other.doc.Staged; err == nil && s != nil && other.staged != nil {
			withKEK(other.staged.secret, func(kek []byte) {
				err = take(retired{KeyID: s.KeyID, Created: s.Created, Retired: newStamp(now), Unused: true}, kek)
			})
		}
	})
	if err != nil {
		return nil, fmt.Errorf("absorb: %w", err)
	}
	if k.StagedID() != "" && len(doc.Retired) >= MaxRetired {
		return nil, fmt.Errorf("absorb: the %d retired KEKs of both keyrings leave no room for the staged one", len(doc.Retired))
	}
	return revise(k, "absorb", &doc)
}

// holdersBeside returns the names under which other lists machines, or names former ones,
// that know the current KEK of k and that k does not list. A machine that joined under
// other knows every KEK that other holds.
func holdersBeside(k, other *Keyring) (names []string) {
	if !holdsOrStages(other, k.CurrentID()) {
		return nil
	}
	for _, n := range other.doc.Nodes {
		if listed := k.doc.node(n.Name); listed == nil || listed.EK != n.EK {
			names = append(names, n.Name)
		}
	}
	return append(names, other.doc.Former...)
}

// holdsOrStages reports whether k has the KEK, open or staged.
func holdsOrStages(k *Keyring, id seal.KeyID) bool { return k.Holds(id) || k.StagedID() == id }

// FollowTrusted returns remote, without the node's own section, if k may follow it
// because an operator vouches for it. It demands the same as [Follows], except that the
// current KEK may be any KEK that k holds and whose key ID the operator names.
func FollowTrusted(k *Keyring, remote *Untrusted, trusted seal.KeyID, mem seal.Memory) (*Keyring, error) {
	if id := remote.CurrentID(); id != trusted {
		return nil, seal.Errorf(seal.CauseAnchor, "compare it with the nodes whose keyring is to be kept", "the keyring's current key ID is %s, and %s is to be trusted", id, trusted)
	}
	other, err := OpenHeld(k, remote, mem)
	if err != nil {
		return nil, err
	}
	if err := checkFollowed(k, remote, other.kek, nil); err != nil {
		other.Close()
		return nil, err
	}
	return other, nil
}
