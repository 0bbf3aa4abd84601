// Package slotrecord keeps, in a file beside the keyring, the ways into the keyring that
// commands on this node made or an operator confirmed.
//
// Whoever holds the KEK can write a keyring with a way of his own that MAC and anchor
// accept. Rotation would carry it on, so the difference is announced, and rotate asks. A
// serve compares with the record in its memory: only who can change the file while no
// serve runs can forge it.
package slotrecord
