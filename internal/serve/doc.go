// Package serve is the running plugin: the KMS socket for kube-apiserver, the admin socket
// for commands, and HTTP for health and metrics.
//
// The KMS socket answers from the first moment, with the reason if the keyring is locked.
// Meanwhile the keyring is opened, and tried again until it opens. After that, Encrypt and
// Decrypt are memory operations. Three loops run beside them: a self-test of every slot, a
// watch on the stored keyring, and the tidying up of boot states that have passed.
package serve
