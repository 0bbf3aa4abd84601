// Package hsm wraps KEKs with a key in a PKCS#11 token: a hardware security
// module, a smart card, or a software token such as SoftHSM 2.
//
// The key never leaves the token. To wrap, the token encrypts the KEK; to
// unwrap, it decrypts what the slot holds. How it does that (AES-GCM, AES key
// wrap with padding, RSA-OAEP) depends on what the token offers and the key
// allows; the slot records it.
//
// A PKCS#11 module is a shared library that runs inside this process. Its state
// belongs to the process, whoever loaded it, so all wrappers over one module take
// turns. Each operation initialises the module, opens a session, logs in, does
// its work, and undoes all of it: between two operations there is no session
// that could be lost, and a token may be taken out and put back. The library itself
// stays loaded: many modules don't survive being unloaded.
//
// A PIN that the token refused is not tried again until it changes, however
// often unlocking is repeated and however often its file is written; nor is one to
// which the token's answer was neither yes nor no nor trouble of the device, since that
// may have counted, unless a login with it went well before. The last try before a
// lock-out is left to a person.
//
// Nothing of a PIN or a KEK stays behind but in locked memory, as far as that is in
// our hands: blocks and registers that a call went through are overwritten, which
// tests see over both modules that they use. What a module keeps in memory of its own is its
// business. Children of this process inherit nothing: Go forks only to execute another
// program, and between operations a module has no file open.
//
// Modules are C. Without cgo this package builds, and [New] says how to get one
// that works.
package hsm
