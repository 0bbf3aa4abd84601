// Package measuredboot really boots machines, and checks when kleidi opens. OVMF with
// Secure Boot measures into a software TPM what QEMU gives it, systemd's stub or shim
// and GRUB start Debian's kernel, and the initrd runs the kleidi binary.
//
// A machine is a TPM, firmware variables and a state folder that last from boot to
// boot. Each test is one machine: a list of boots, each with an image, steps to run in
// it, and the expected result: whether kleidi opens, its message if it does not, which
// PCRs differ from the first boot, and that the DEK seed of the first boot decrypts.
// TestMain prints all boots as a table, and writes docs/measured-boot.md from the
// table.
//
// The guest's initrd holds only a small init and kernel modules. kleidi is on a
// separate disk, whose digest is in the initrd, so that the measured initrd verifies it
// as it would verify a root file system. QEMU emulates the CPU, so the tests need no
// KVM.
package measuredboot
