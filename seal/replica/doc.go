// Package replica keeps a node's keyring in step with those of the other nodes, through
// the cluster store.
package replica
