// Package unlock is the state machine that turns a stored keyring into an open
// one: locked, through the gate, by the slots in the configured order, to open.
//
// Locked is a state and no failure of the process: the reason is known and
// shown, and another attempt follows. Open is left only with the process: a
// keyring that was changed on disk and does not verify is reported, and the one
// that is open goes on serving, for the cluster comes first.
//
// One Unlocker is the one writer of a node's keyring. Every change goes the same
// way: save, anchor, end the epochs that are over, and only then announce, so that
// a crash between any two steps leaves a keyring that opens and no key ID that
// is forgotten.
package unlock
