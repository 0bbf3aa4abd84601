package keyring

import (
	"bytes"
	"crypto/hmac"
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/seal"
)

// The rules by which a node replaces its shared keyring with another one, or publishes
// its own in place of another. They read only the two keyrings.

// The reasons not to follow a keyring although nothing is wrong with it.
var (
	// ErrInStep: the node already has this keyring.
	ErrInStep = errors.New("the keyring is the one that this node has")
	// ErrOlder: the revision is lower. [Precedes] says whether the node's own keyring
	// replaces it.
	ErrOlder = errors.New("the keyring has a lower revision than this node's")
	// ErrStagedClosed: the keyring is under the KEK that the node has staged, which is
	// not open now. The keyring can't be judged before that KEK is open.
	ErrStagedClosed = errors.New("the keyring is under the staged KEK, which is not open on this node")
	// ErrNotAcknowledged: the keyring is under the KEK that the node has staged, but the
	// node's own section has no slots for that KEK.
	ErrNotAcknowledged = errors.New("this node has not acknowledged that KEK yet")
)

const (
	hintForged = "find out who else writes to the cluster store"
	// hintMissed is for a newer keyring. To a node that was down during its own removal, the
	// keyring of the others looks as a forged one does.
	hintMissed = "if this node was removed while it was down, stop kleidi serve here (systemctl stop kleidi) and run kleidi reset; otherwise " + hintForged
	// hintPruned is for an older keyring. Once a KEK is pruned, a keyring under it looks as
	// a forged one does.
	hintPruned = "if etcd was restored from a snapshot that is older than the prune of that KEK, bring the KEK back with kleidi keyring import-archive FILE and the recovery identity; otherwise " + hintForged
	hintFork   = "the store was restored in the middle of a change, or somebody who knows a former KEK writes to it: compare the two on the nodes that hold them, and decide which one to keep"
	hintRejoin = "stop kleidi serve here (systemctl stop kleidi), then run kleidi reset; to be a node again, have another node approve this one, and join"
)

// Follows returns nil if the node with local replaces it with remote. It demands, in this
// order:
//
//  1. both are of format 2, and of the same cluster;
//  2. remote's current KEK is local's current one, or the staged one that this node has
//     acknowledged. An honest rotation always satisfies this, because it waits for this
//     node. So a keyring with an intruder's own KEK is refused, even if the intruder
//     knows the anchored KEK;
//  3. that KEK opens remote: key ID, MAC and retired KEKs, as in [Untrusted.Open];
//  4. remote's revision is higher;
//  5. local's current KEK is among remote's;
//  6. remote lists this node, with the same endorsement key, storage root key and epoch index;
//  7. remote does not go back from a commit in the cluster store to one in a file.
//
// The KEK is in memory, so Follows needs no gate and no slot. An error is
// [ErrStagedClosed] (2), [ErrInStep] or [ErrOlder] (4), or a [*seal.Error] with cause
// seal.CauseAnchor (1, 2, 5, 7), one of Open's (3), seal.CauseForked (4) or
// seal.CauseNodeRemoved (6).
func Follows(local *Keyring, remote *Untrusted) error {
	next, err := local.Follow(remote, nil)
	if err == nil {
		next.Close()
	}
	return err
}

// Follow returns the node's keyring after it has replaced k with remote: remote with
// k's own section, and with the KEKs that k holds open. It fails as [Follows] does. If
// machine is not nil, remote must list its TPM for the node, whatever TPM k lists.
func (k *Keyring) Follow(remote *Untrusted, machine *Node) (*Keyring, error) {
	kek, err := followedKEK(k, remote)
	if err != nil {
		return nil, err
	}
	if err := checkFollowed(k, remote, kek, machine); err != nil {
		return nil, err
	}
	var staged *shared
	if s := remote.doc.Staged; s != nil && s.KeyID == k.StagedID() {
		staged = k.staged
	}
	next, err := assemble(remote.body, k.own.beside(remote.doc), kek, staged)
	if err != nil {
		return nil, fmt.Errorf("follow keyring: %w", err)
	}
	return next, nil
}

// followedKEK checks conditions 1 and 2.
func followedKEK(k *Keyring, remote *Untrusted) (*shared, error) {
	if err := checkComparable(k, remote); err != nil {
		return nil, err
	}
	switch id := remote.CurrentID(); {
	case id == k.CurrentID():
		return k.kek, nil
	case id != k.StagedID():
		hint := hintPruned
		if remote.Revision() > k.Revision() {
			hint = hintMissed
		}
		return nil, seal.Errorf(seal.CauseAnchor, hint, "the keyring of revision %d has the current key ID %s, which this node (revision %d, key ID %s) has never acknowledged",
			remote.Revision(), id, k.Revision(), k.CurrentID())
	case !k.Acknowledged():
		return nil, seal.Errorf(seal.CauseAnchor, hintForged, "the keyring of revision %d makes key ID %s current: %w", remote.Revision(), id, ErrNotAcknowledged)
	case k.staged == nil:
		return nil, ErrStagedClosed
	}
	return k.staged, nil
}

func checkComparable(k *Keyring, remote *Untrusted) error {
	if k.doc.Format != format2 || remote.doc.Format != format2 {
		return seal.Errorf(seal.CauseAnchor, hintForged, "keyrings of format %d and %d can't follow each other", k.doc.Format, remote.doc.Format)
	}
	if k.ClusterID() != remote.ClusterID() {
		return seal.Errorf(seal.CauseAnchor, hintForged, "the keyring is of cluster %s, this node is of cluster %s", remote.ClusterID(), k.ClusterID())
	}
	return nil
}

// checkFollowed checks conditions 3 to 7.
func checkFollowed(k *Keyring, remote *Untrusted, kek *shared, machine *Node) error {
	err := remote.verify(kek.secret)
	if err != nil {
		return err
	}
	switch theirs, mine := remote.Revision(), k.Revision(); {
	case theirs < mine:
		return ErrOlder
	case theirs == mine && bytes.Equal(remote.body, k.body):
		return ErrInStep
	case theirs == mine:
		return seal.Errorf(seal.CauseForked, hintFork, "two keyrings of revision %d differ: neither follows the other", mine)
	}
	if err := remote.checkAnchor(k.Anchor()); err != nil {
		return err
	}
	self, ok := k.Self()
	if machine == nil {
		machine = &self
	}
	if !ok {
		return seal.Errorf(seal.CauseNodeRemoved, hintRejoin, "the keyring of this node does not say which node it is")
	} else if now := remote.doc.node(self.Name); now == nil || !now.SameTPM(*machine) {
		return seal.Errorf(seal.CauseNodeRemoved, hintRejoin, "revision %d of the keyring does not hold this node, %s, with its TPM", remote.Revision(), self.Name)
	}
	if k.doc.Commit == CommitCluster && remote.doc.Commit != CommitCluster {
		return seal.Errorf(seal.CauseAnchor, hintForged, "revision %d of the keyring goes back to a commit on one node", remote.Revision())
	}
	return nil
}

// verify makes those checks of Open that need no anchor, and keeps no KEK.
func (u *Untrusted) verify(kek *seal.Secret) error {
	err := ErrClosed
	withKEK(kek, func(b []byte) { err = u.open(newOpen(u), b) })
	return err
}

// Precedes returns nil if the node publishes local in place of remote, which the
// cluster store holds. It demands that both are of format 2 and of one cluster, that
// remote's MAC verifies under the KEK that remote names and local holds, and that
// remote's revision is lower: the cluster store was then restored from an older
// snapshot. An error is a [*seal.Error] with cause seal.CauseAnchor, or [ErrInStep], or
// seal.CauseForked if the revisions are equal, if remote has a higher revision under
// a KEK that local has left, or a lower one under the KEK that local has staged.
func Precedes(remote *Untrusted, local *Keyring) error {
	if err := checkComparable(local, remote); err != nil {
		return err
	}
	verified := false
	withHeld(local, remote.CurrentID(), func(kek []byte) { verified = hmac.Equal(bodyMAC(kek, remote.body), remote.mac) })
	theirs, mine := remote.Revision(), local.Revision()
	switch staged := remote.CurrentID() == local.StagedID(); {
	case verified && staged && theirs < mine: // an activation that arrived after the store was restored
		return seal.Errorf(seal.CauseForked, hintFork, "the keyring of revision %d makes key ID %s current, which this node has staged in revision %d: neither follows the other", theirs, remote.CurrentID(), mine)
	case staged:
		return seal.Errorf(seal.CauseAnchor, hintForged, "the keyring of revision %d under key ID %s is not authenticated by a KEK that this node has trusted", theirs, remote.CurrentID())
	case !verified:
		return seal.Errorf(seal.CauseAnchor, hintForged, "the keyring of revision %d under key ID %s is not authenticated by a KEK that this node holds", theirs, remote.CurrentID())
	case theirs == mine && bytes.Equal(remote.body, local.body):
		return ErrInStep
	case theirs == mine:
		return seal.Errorf(seal.CauseForked, hintFork, "two keyrings of revision %d differ: neither follows the other", mine)
	case theirs > mine && remote.CurrentID() != local.CurrentID():
		return seal.Errorf(seal.CauseForked, hintFork, "the keyring of revision %d is under key ID %s, which this node (revision %d, key ID %s) has left: neither follows the other", theirs, remote.CurrentID(), mine, local.CurrentID())
	case theirs > mine:
		return seal.Errorf(seal.CauseAnchor, hintForged, "the keyring has a higher revision, %d, than this node's, %d", theirs, mine)
	}
	return nil
}
