// Package keyring implements the keyring: the document that holds the KEKs of a
// cluster in their slots, and the cryptography that authenticates it. The package
// takes and returns bytes; package store keeps them.
//
// A keyring consists of a body and a MAC. The body names the cluster, the revision,
// which every change of the body raises, the current KEK, the staged KEK if there is one,
// the retired KEKs, and the nodes. The body holds the current and the staged KEK in
// slots, which their wrappers can open. It holds each retired KEK encrypted under
// the current one, so that one unsealed KEK opens the whole history.
//
// Anyone can write a keyring, because sealing to a TPM takes only its public key.
// [Parse] therefore returns an [Untrusted]. [Untrusted.Open] turns it into a [Keyring]
// only if the KEK from a slot matches its key ID, which commits to the KEK; if the MAC
// verifies under that KEK; and if the node's [Anchor] names a KEK of this keyring and no
// later revision. Hence only someone who knows the anchored KEK can write that node's
// keyring.
//
// In format 2 all nodes share one keyring. The slots that only one node's TPM opens are
// in the node's own section, which never leaves the node. A node tells the others in a
// [Record] which keyring it trusts. By the rules of [Follows] a node takes a keyring that
// another node has changed; by those of [Precedes] it publishes its own again.
//
// The formats are frozen. docs/keyring-format.md describes them for other readers, and
// testdata holds test vectors. A new format is a new version in a new file beside
// format1.go and format2.go.
package keyring
