// Package members manages the nodes of a cluster: how a node is approved and joins, and
// the list of nodes. The protocol is in packages tpm/attest/joinproof and
// grpcserver/join. This package connects both of its ends with the machine's keyring.
//
// [Desk] is the end of the node that gives the KEK, in a running serve. [Join] is the
// end of the joining node, in a separate command. A change of the shared keyring goes
// through [Reviser]: the unlocker, which commits to the cluster store if there is one.
package members
