// Package members is which nodes a cluster has: how a node is approved and joins, and the
// list of nodes. The protocol is packages tpm/attest/joinproof and grpcserver/join; here
// both of its ends meet the machine's keyring.
//
// [Desk] is the end of the node that gives the KEK, in a running serve. [Join] is the end
// of the node that joins, in a command of its own. A change of the shared keyring goes
// through [Reviser], which today is the file of the node that has the seat.
package members
