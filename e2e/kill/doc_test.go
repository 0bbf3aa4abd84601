// Package kill kills the shipped binary at every durable step of every verb that
// changes the keyring, fills its disk, and cuts the disk's power. After a kill at any
// moment, the keyring must open with all its KEKs, no announced key ID may be
// forgotten, and the verb can be run again.
//
// A durable step is a system call that changes what a crash leaves behind: each file in
// the state folder that is created, written, flushed, linked, renamed or removed, and
// each command to the TPM. The tests kill the process before its N-th step, and raise N
// until the verb completes. They trace the process themselves, because strace counts
// the calls of each thread separately and Go moves goroutines between threads: some
// steps would never be the N-th of any thread.
//
// The tests run as root, as kleidi does: only root may mount a disk, or trace a process
// that has made itself undumpable.
package kill
