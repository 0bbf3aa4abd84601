// Package bootrule is the one rule on what may be bound to a boot: a keyslot, the
// anchor's NV index, a suspension, a sealed PIN, a client key. It takes an event log
// and a set of PCRs, and returns what that set holds; it opens nothing and asks no TPM.
//
// # The rule
//
// A boot authorises only what it measured. Four parts decide what runs, and a set of
// PCRs must hold each of them:
//
// The boot program: PCR 4 has an image. Without it nothing else counts, since any
// program that starts in its place can extend PCRs 8 to 15 to the same values.
//
// Kernel, initrd and command line, by how the machine boots:
//
//	         kernel   initrd         command line
//	UKI      PCR 11   PCR 11, or 9   PCR 11 if Secure Boot is on, else 9 or 12
//	GRUB     PCR 9    PCR 9          PCR 8, or 9
//	EFI stub PCR 4    PCR 9          PCR 9
//
// systemd-boot adds nothing of its own: what it starts is a UKI or an EFI stub.
//
// What the set leaves out is open. A set that leaves a part open is good for one thing:
// where PCR 7 is in it and proves that Secure Boot is on and verified something, it
// holds whatever the keys in force let start. Only callers that say so get that, see
// [SignedBoot]. Where Secure Boot is off, or its state is unknown, nothing is held.
//
// The rule demands what is good and lists nothing that is bad: a log that shows
// nothing, or a boot that is not understood, is refused.
//
// # What it believes
//
// The log must have been verified against a quote of at least these PCRs, or be a
// prediction. The rule reads no event of another PCR, except to word a refusal.
package bootrule
