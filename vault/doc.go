// Package vault wraps KEKs with a key of a Transit secrets engine, in Vault or OpenBao.
// The Transit key never leaves the server. The server encrypts the KEK when a slot is
// made, and decrypts it when the slot is opened.
//
// Each operation has a TLS connection of its own: it logs in, encrypts or decrypts,
// revokes the token of the login, and closes the connection. No token outlives the
// operation, so none must be renewed, and a wrapper that was made while the server was
// down works once the server is up. Only a secret ID that came response-wrapped is kept,
// in locked memory, because it can be unwrapped only once.
//
// A slot names its Transit key, so that a wrapper recognises its own slots. The address
// and the credentials come from [Config] alone. The environment (VAULT_*, HTTPS_PROXY) is
// ignored.
//
// The KEK travels as base64 inside JSON inside TLS. The buffers of the connection belong
// to vault/internal/client, so that it can clear them. It can't clear buffers that
// crypto/tls replaced by larger ones, nor tokens and secret IDs, which are strings in the
// client library.
//
// No associated data is bound to the ciphertext, because transit/rewrap takes none. The
// key ID and the MAC of the keyring decide which KEK a slot may hold.
package vault
