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
// k with the KEKs that only other holds as retired KEKs, so that no KEK is forgotten.
func Absorb(k, other *Keyring, now time.Time) (*Keyring, error) {
	if s := other.doc.Staged; s != nil && other.staged == nil && !holdsOrStages(k, s.KeyID) {
		return nil, fmt.Errorf("absorb: the other keyring's staged KEK %s is not open here", s.KeyID)
	}
	doc := *k.doc
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
	return revise(k, "absorb", &doc)
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
	if err := checkFollowed(k, remote, other.kek); err != nil {
		other.Close()
		return nil, err
	}
	return other, nil
}
