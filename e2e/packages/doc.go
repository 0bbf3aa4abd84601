// Package packages installs, upgrades, removes and purges the packages on a machine with
// the real dpkg and a real systemd: a Debian root in systemd-nspawn, whose TPM is a swtpm.
// There it also tries the unit: what kube-apiserver sees of the socket through stops,
// crashes and upgrades, and what systemd-analyze says of the sandbox. Needs root.
package packages
