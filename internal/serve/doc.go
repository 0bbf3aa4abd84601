// Package serve is the running plugin: the KMS socket for kube-apiserver, the admin
// socket for commands, and HTTP for health and metrics.
//
// The KMS socket answers from the first moment, with the reason if the keyring is
// locked. Meanwhile serve tries to open the keyring until it opens. After that, Encrypt
// and Decrypt work in memory only. Three loops run beside them: a self-test of the slots
// that a token, a server or a plugin opens, a watch on the stored keyring, and the removal
// of outdated boot states. With a cluster store, three more keep this node in step, drive
// its rotations, and renew its client certificate.
package serve
