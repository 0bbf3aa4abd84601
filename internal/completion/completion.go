// Package completion finds the words in a stored keyring with which a shell completes a
// command line. Nothing is verified: a word only spares the operator typing.
package completion

import (
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// Words finds words of one kind, as the node of the view sees the keyring.
type Words func(view slotview.Reader, u *keyring.Untrusted) []string

// SlotNames are the names of the slots, with those of missing slots.
func SlotNames(view slotview.Reader, u *keyring.Untrusted) []string {
	return slotview.Names(view.WithMissing(slotview.WithoutDebts(u.Slots())))
}

// UnrevokedEKs are the TPMs that still open copies of former slots.
func UnrevokedEKs(view slotview.Reader, u *keyring.Untrusted) (all []string) {
	for _, d := range view.Debts(u.Slots()) {
		all = append(all, d.EK)
	}
	return all
}

// Signers are the fingerprints of the keys that sign boot states.
func Signers(view slotview.Reader, u *keyring.Untrusted) (all []string) {
	for _, s := range u.Slots() {
		if key, _ := view.Signer(s, u.Info().ClusterID.String()); key != "" {
			all = append(all, key)
		}
	}
	return all
}

// KeyIDs are the key IDs in the keyring, the current one first.
func KeyIDs(view slotview.Reader, u *keyring.Untrusted) []string {
	return append(CurrentKeyID(view, u), RetiredKeyIDs(view, u)...)
}

// CurrentKeyID is the current key ID.
func CurrentKeyID(_ slotview.Reader, u *keyring.Untrusted) []string {
	return []string{string(u.CurrentID())}
}

// RetiredKeyIDs are the key IDs of the retired KEKs.
func RetiredKeyIDs(_ slotview.Reader, u *keyring.Untrusted) (all []string) {
	for _, r := range u.Info().Retired {
		all = append(all, string(r.KeyID))
	}
	return all
}

// ClusterID is the cluster's ID.
func ClusterID(_ slotview.Reader, u *keyring.Untrusted) []string {
	return []string{u.ClusterID().String()}
}

// OtherNodes are the names of the nodes in the keyring, except this one.
func OtherNodes(view slotview.Reader, u *keyring.Untrusted) (all []string) {
	for _, other := range u.Info().Nodes {
		if other.Name != view.Node {
			all = append(all, other.Name)
		}
	}
	return all
}

// ThisNode is the name of this node.
func ThisNode(view slotview.Reader, _ *keyring.Untrusted) []string { return []string{view.Node} }
