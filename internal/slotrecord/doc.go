// Package slotrecord keeps a record, in a file beside the keyring, of the ways into the
// keyring that commands on this node made or an operator confirmed.
//
// A holder of the KEK can write a keyring with an additional way in, and MAC and anchor
// accept it. A rotation would keep that way, so the difference is announced, and rotate
// asks. A serve compares the keyring with the record in its memory. Only someone who can
// change the file while no serve runs can forge the record.
package slotrecord
