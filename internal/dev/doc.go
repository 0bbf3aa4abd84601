// Package dev runs kleidi on a simulated machine: a swtpm with the measurements of a
// chosen boot, a folder with the node's files, and the real serve on top.
//
// The first run makes the configuration, the recovery identity and the keyring, as an
// operator does with kleidi init. A later run of the same folder boots the machine again,
// so that a changed kernel or command line shows what attestation says about it.
package dev
