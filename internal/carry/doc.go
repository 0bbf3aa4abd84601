// Package carry moves the shared keyring between nodes in files that an operator carries, for
// nodes without access to the cluster store.
//
// A file holds the shared keyring and the record of the node that wrote it. Nothing in it is
// secret, and nothing in it is trusted: the node that reads the file follows the keyring only
// by the rules for the cluster store, and puts the record into the store only if the record
// verifies.
package carry
