// Package nspawn boots a Debian with a real systemd in a container: a root folder of
// .ci/base in systemd-nspawn, whose TPM is a swtpm. The heavy tests share it. It needs
// root.
//
// A machine has network, process, mount and control-group trees of its own. They end with
// the test, whatever its result.
package nspawn
