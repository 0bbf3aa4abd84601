// Package guest has a node of kubeadm that really boots: QEMU with OVMF, Secure Boot and a
// TPM at /dev/tpmrm0, a signed unified kernel image, Debian with systemd, containerd,
// kubelet and kubeadm. QEMU emulates the CPU, so kubeadm init takes minutes: this suite
// runs by `make e2e/guest`, and before a release, but not with the others.
package guest
