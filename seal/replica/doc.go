// Package replica keeps a node's keyring in step with the cluster store, which holds
// the part of the keyring that all nodes share.
//
// In a round the node reads the store. It follows a newer keyring if [keyring.Follows]
// allows it. It publishes its own keyring in place of an older one, which means that the
// store was restored from a snapshot. It then opens and seals a staged KEK, and writes a
// record that says which keyring it trusts. If neither of two keyrings follows the other,
// they are a fork: the node overwrites nothing and reports the fork.
//
// A change of the shared keyring counts as made once it is in the store, and the node
// saves it only after that. So [Replica.Commit] comes before the save of package
// unlock.
//
// The node serves without the store. No part of a start waits for the store, with one
// exception: in a cluster of several nodes, a node looks there for a moment before it
// announces a key ID, see [Replica.Look].
package replica
