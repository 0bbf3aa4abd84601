// Package keyring is the document that holds a cluster's KEKs in their slots,
// and the cryptography that makes it trustworthy. It takes and returns bytes:
// where they are kept is the business of package store.
//
// A keyring is a body and a MAC. The body names the cluster, a revision that
// every change raises, the current KEK, perhaps a staged one, the retired ones
// and the nodes. A KEK itself stands in it only as slots, each of which some
// wrapper can open, or, once retired, encrypted under the current KEK. So one
// unseal opens the whole history.
//
// Anyone can write a keyring: sealing to a TPM needs nothing but its public
// key. So what [Parse] returns is [Untrusted], and [Untrusted.Open] makes a
// [Keyring] of it only if the KEK that came out of a slot matches its key ID,
// which commits to it, the MAC verifies under it, and the [Anchor] that this node
// last trusted names a KEK of this keyring. Hence whoever knows the anchored KEK
// can write that node's keyring, and nobody else can.
//
// In format 2 all nodes share one keyring. Each node keeps the slots that only its own
// TPM opens in an own section, which never leaves it, and tells the others in a
// [Record] what it trusts. [Follows] and [Precedes] are the rules by which it takes a
// keyring that another node has changed.
//
// The formats are frozen; docs/keyring-format.md describes them so that others can
// read them, and testdata holds vectors. A change of format is a new version in a
// new file beside format1.go and format2.go.
package keyring
