// Package simboot is a machine with a TPM that boots as it is told.
//
// A [Machine] runs swtpm, Debian's TPM emulator, over a folder that keeps the
// TPM's state. [Machine.Boot] does what firmware, boot loader and kernel do on
// a real machine: it starts the TPM again, extends a TCG PC Client measured-boot
// sequence into every active bank and writes the matching event log. What is
// measured follows from the fields of a [Boot], so a machine can boot another
// kernel, another command line, or with Secure Boot off, and exactly those PCRs
// differ that differ on a real machine. The sequences are modelled on logs of
// real boots (OVMF with systemd-stub 252, with shim 16.1 and GRUB 2.06, and with
// an EFI stub kernel). [Boot.Files] are the files that are measured, so that what
// the next boot will measure can be told from them.
//
// It serves `kleidi dev` and tests. It protects nothing: the emulator's state,
// seeds and all, is a file.
package simboot
