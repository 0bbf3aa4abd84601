// Package kill kills the shipped binary at every durable step of every verb that
// changes the keyring, fills its disk, and cuts the disk's power. Whatever the moment, the keyring must
// open afterwards with all its KEKs, no key ID that was announced may be
// forgotten, and the verb can be run again.
//
// A durable step is a system call that changes what a crash leaves behind: in the
// state folder each file that is created, written, flushed, linked, renamed or
// removed, and each command to the TPM. The process is killed before the N-th of
// them, and N is raised until the verb completes. The tests trace the process
// themselves, because strace counts the calls of each thread alone, and Go moves
// goroutines between threads: some steps would never be the N-th of any.
//
// The tests run as root, as kleidi does: only root may trace a process that
// has made itself undumpable, and mount a disk.
package kill
