// Package hsm wraps KEKs with a key in a PKCS#11 token: a hardware security
// module, a smart card, or a software token such as SoftHSM 2.
//
// The key never leaves the token. To wrap, the token encrypts the KEK. To unwrap, it
// decrypts the ciphertext in the keyslot. The mechanism (AES-GCM, AES key wrap with
// padding, or RSA-OAEP) depends on what the token offers and on what the key allows. The
// keyslot names it.
//
// A PKCS#11 module is a shared library that runs inside this process. Its state belongs
// to the process, whoever loaded it, so only one operation runs on a module at a time.
// Each operation initialises the module, opens a session, logs in, does its work, and
// undoes all of that. Between two operations there is no session that could be lost, and
// a token may be taken out and put back. The library itself stays loaded, because many
// modules don't survive being unloaded.
//
// kleidi does not give a token a PIN again that the token has refused, however often it
// tries to unlock, and however often the file is written, until the PIN changes or kleidi
// is restarted. A PIN is not retried after an ambiguous answer either, because the token
// may have counted it as a failed attempt, unless that PIN has worked before. kleidi
// leaves the last attempt before a lock-out to the operator.
//
// Copies of PINs and KEKs outside locked memory are overwritten, as far as this package
// can do so: in the blocks and registers that a call used. The tests check that with two
// modules. The package can't erase what a module keeps in its own memory. Child processes
// inherit nothing: Go forks only to execute another program, and between operations a
// module has no file open.
//
// Modules are C libraries. The package builds without cgo, and [New] then says how to get
// a build that works.
package hsm
