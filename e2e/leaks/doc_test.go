// Package leaks looks for keys where none may be: in everything that the shipped binary
// writes at debug level in normal operation, in trouble and in a panic, in core files,
// and in the memory of a running serve. It obtains each KEK as an operator could, with
// the recovery identity, and searches for it raw, in hexadecimal, and in base64 at each
// alignment. It searches for the identity and for DEK seeds in the same way.
//
// The tests run as root, because only root can read the memory of a process that has
// made itself undumpable.
package leaks
