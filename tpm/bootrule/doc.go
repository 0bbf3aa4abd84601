// Package bootrule is the only rule on what may be bound to a boot: a keyslot, the
// anchor's NV index, a suspension, a sealed PIN, a client key. It takes an event log
// and a set of PCRs, and returns which parts of the boot the set holds. It opens
// nothing and asks no TPM.
//
// # The rule
//
// A boot authorises only what it measured. Four parts decide what runs, and a set of
// PCRs must hold each of them:
//
// The boot program: PCR 4 has an image. Without it no other PCR proves anything,
// because another boot program can extend PCRs 8 to 15 to the same values.
//
// Kernel, initrd and command line, by how the machine boots:
//
//	         kernel   initrd         command line
//	UKI      PCR 11   PCR 11, or 9   PCR 11 if Secure Boot is on, else 9 or 12
//	GRUB     PCR 9    PCR 9          PCR 8, or 9
//	EFI stub PCR 4    PCR 9          PCR 9
//
// systemd-boot adds nothing of its own: it starts a UKI or an EFI stub.
//
// A part that the set does not hold is open. A set with an open part has one use: if it
// contains PCR 7, and PCR 7 proves that Secure Boot is on and verified something, the
// set holds every boot that the keys in force allow. Only callers that ask for that get
// it, see [SignedBoot]. If Secure Boot is off, or its state is unknown, such a set
// holds nothing.
//
// The rule lists only what is good, and nothing that is bad. So it refuses a log that
// shows nothing, and a boot that it does not understand.
//
// # What it believes
//
// The log must have been verified against a quote of at least these PCRs, or be a
// prediction. The rule reads no event of another PCR, except to word a refusal.
package bootrule
