// Package rollout rotates the KEK of several nodes. It stages a fresh KEK in the cluster
// store, wrapped for every boot state that the nodes' records name, and activates the KEK
// once every node has acknowledged it. Package replica makes each node acknowledge and
// follow.
//
// The node that staged the KEK, or took over the rotation, drives the rotation in its
// running serve. The keyring in the store names that node, so a rotation goes on after a
// restart.
package rollout
