// Package measuredboot boots machines in earnest, and sees when kleidi opens: OVMF
// with Secure Boot measures into a software TPM what QEMU gives it, systemd's stub
// or shim and GRUB start Debian's kernel, and its initrd runs the kleidi binary.
//
// A machine is a TPM, firmware variables and a state folder that live from boot to
// boot. Each test is one machine: a list of boots, each with an image, what is done
// in it, and what is expected: whether kleidi opens, what it says when it does not,
// which PCRs differ from the first boot, and that the DEK seed of the first boot
// decrypts. TestMain prints all boots as a table; docs/measured-boot.md is made from it.
//
// The guest's initrd holds a small init and kernel modules only. kleidi lies on a
// disk of its own, whose digest is in the initrd: as a root file system would be
// verified by the measured initrd. QEMU emulates the CPU, so it takes no KVM.
package measuredboot
