// Package bootpolicy is what kleidi demands of the event log of a boot. It takes
// bytes and returns values; it opens nothing and asks no TPM.
//
// A boot policy names a bank, the exact PCRs that a quote must cover, and for each PCR
// what may have been measured into it. [Record] writes a boot policy from a boot, a person
// reads and edits it as YAML, and [Judge] compares a later boot with it.
//
// # One idea
//
// Only digests are compared. The quote proves the digests of a log and their order, and
// nothing else. So every rule is a list of entries that the digests of a PCR must match,
// and an event that matches no entry is refused: unknown means no. An entry that is written
// as text (a version, a command line, a certificate) stands for the digests that measuring
// this text gives. The rest of the log, the types and data of its events, is a claim. A
// claim can make a verdict stricter and its wording better; it can never make a rule hold.
// Judge reads the data of two kinds of events, GRUB's command lines and certificates, and
// only after the hash of the data was found to be the digest.
//
// # What it can't do
//
// A boot policy enforces if another machine verifies. On the machine itself the TPM's
// authorization policy enforces, and the boot policy explains.
package bootpolicy
