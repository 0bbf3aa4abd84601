// Package packages installs, upgrades, removes and purges the packages on a machine with
// the real dpkg and a real systemd: a Debian root in systemd-nspawn, whose TPM is a
// swtpm. There it also tests the unit: how kube-apiserver sees the socket during stops,
// crashes and upgrades, and the verdict of systemd-analyze on the sandbox. Packages of
// kernels run the hooks, as the package installs them, systemd runs the verifier, and the
// package with PKCS#11 takes the place of the other one. It needs root.
package packages
