// Package vault wraps KEKs with a key of a Transit secrets engine, in Vault or
// OpenBao. The Transit key never leaves the server: it is asked to encrypt a KEK
// when a slot is made, and to decrypt it when the slot is opened.
//
// An operation is one TLS connection of its own: log in, encrypt or decrypt, give
// the token back, close. Nothing outlives it, so no renewal can go stale, and a
// wrapper that was made when the server was down works once it is up.
//
// A slot names its Transit key to tell its own slots from others'. What is dialled,
// and with which credentials, comes from [Config] alone; the environment (VAULT_*,
// HTTPS_PROXY) has no say.
//
// The KEK travels as base64 inside JSON inside TLS. The connection's buffers are
// this package's own, see wire, so that they can be cleared. What can't be: buffers
// that crypto/tls outgrew, and tokens and secret IDs, which are strings in the
// client library.
//
// No associated data is bound to the ciphertext: transit/rewrap takes none, and
// what a slot may hold is decided by the key ID and the keyring's MAC.
package vault
