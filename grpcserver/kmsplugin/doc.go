// Package kmsplugin wraps KEKs with another KMS v2 plugin, over that plugin's socket. The
// plugin encrypts the KEK when a slot is made, and decrypts it when the slot is opened, as it
// would do for kube-apiserver. So every backend that has a KMS v2 plugin can open kleidi's
// keyring.
//
// Before each call the package asks the kernel who listens on the socket (SO_PEERCRED). The
// KEK goes only to a plugin of root or of kleidi's own user.
//
// A slot records the plugin's key ID, so that a wrapper can tell that the plugin's key has
// changed since. KMS v2 binds nothing else to a ciphertext: the key ID and the MAC of the
// keyring decide which KEK a slot may hold.
//
// The KEK passes through buffers of gRPC, which this package can't clear. kleidi serve
// locks those buffers with the rest of its memory, and starts without that lock only if
// swap is off or memory.lock is best-effort.
package kmsplugin
