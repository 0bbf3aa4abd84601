// Package unlock implements the state machine that opens a stored keyring. It starts
// locked. An attempt to unlock passes the gate, then tries the slots in the
// configured order. If a slot opens, the state is open.
//
// Locked is a state, not a failure of the process: the reason is known and shown,
// and another attempt follows. Open lasts until the process ends, or until [Lock] closes
// the keyring of a node that was removed. If the stored keyring changes and does not
// verify, the problem is reported, and the open keyring still serves, because the cluster
// must go on.
//
// An Unlocker is the only writer of a node's keyring. Every change goes the same way:
// commit in the cluster store, if the nodes share the keyring; save, anchor, end the epochs
// that are over, and only then announce. So a crash between any two steps leaves a keyring
// that opens, and no announced key ID is forgotten.
package unlock
