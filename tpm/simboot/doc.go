// Package simboot simulates a machine with a TPM that boots in a given way.
//
// A [Machine] runs swtpm, Debian's TPM emulator, over a folder that keeps the TPM's
// state. [Machine.Boot] does the work of firmware, boot loader and kernel on a real
// machine: it starts the TPM again, extends a TCG PC Client measured-boot sequence into
// every active bank, and writes the matching event log. The measurements follow from
// the fields of a [Boot]. So a machine can boot another kernel, another command line,
// or with Secure Boot off, and exactly the PCRs differ that would differ on a real
// machine. The sequences are modelled on logs of real boots (OVMF with systemd-stub
// 252, with shim 16.1 and GRUB 2.06, and with an EFI stub kernel). [Boot.Files] returns
// the measured files, so that the measurements of the next boot can be predicted from
// them.
//
// The package serves "kleidi dev" and tests. It protects nothing: the state of the
// emulator, including its seeds, is a file.
package simboot
