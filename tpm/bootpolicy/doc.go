// Package bootpolicy is what kleidi demands of the event log of a boot. It takes
// bytes and returns values; it opens nothing and asks no TPM.
//
// A boot policy names a bank, exactly the PCRs that a quote has to cover, and for
// each of them what may have been measured into it. [Record] writes one from a
// boot, a person reads and edits it as YAML, and [Judge] compares a later boot
// with it.
//
// # One idea
//
// Only digests are compared. The quote proves the digests of a log and their
// order, and nothing else, so every rule comes down to a list of entries that the
// digests of a PCR have to match, and an event that no entry matches is refused:
// unknown means no. An entry that is written as text (a version, a command line,
// a certificate) stands for the digests that measuring this text gives. What the
// log claims beyond that, the types and the data of its events, can make a
// verdict stricter and its wording better; it can never make a rule hold. Data
// is read in two places, a command line of GRUB and a certificate, and there only
// after its hash was found to be the digest.
//
// # What it can't do
//
// A boot policy decides where somebody else verifies. On the machine itself the
// TPM's authorization policy enforces, and the boot policy explains.
package bootpolicy
