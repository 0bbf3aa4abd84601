// Package replica keeps a node's keyring in step with the cluster store, which holds
// the part of the keyring that all nodes share.
//
// In a round the node reads the store. It follows a newer keyring if [keyring.Follows]
// allows it, and publishes its own in the place of an older one, which means that the
// store was restored from a snapshot. It then opens and seals a staged KEK, and says in
// its record what it trusts. Two keyrings of which neither follows the other are a fork:
// the node overwrites nothing and says so.
//
// A change of the shared keyring counts as made once it is in the store. Only then does
// the node save it. So [Replica.Commit] comes before the save of package unlock.
//
// The node serves without the store. No part of a start waits for it, except that a node
// of several looks there for a moment before it announces a key ID: [Replica.Look].
package replica
