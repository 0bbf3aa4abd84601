// Package leaks looks for keys where none may be: in all that the shipped binary
// writes at debug level, in health, in trouble and in panic, in core files, and
// in the memory of a running serve. It obtains each KEK as an operator could,
// with the recovery identity, and searches for it raw, in hexadecimal and in
// base64 at each alignment; so for the identity and for DEK seeds.
//
// The tests run as root, since only root reads the memory of a process that has
// made itself undumpable.
package leaks
