// Package seal holds the vocabulary that every other package of kleidi speaks:
// [Secret] (locked memory), [ClusterID], [KeyID], [Slot], [Wrapper] and the
// typed causes for which a slot does not open.
//
// The key-encryption key, the KEK, is 32 random bytes. A wrapper (a TPM, a
// PKCS#11 token, Vault's Transit engine, an age recovery recipient) turns it
// into a slot, and a slot back into the KEK. A slot holds ciphertext and
// identifiers only: it is read before anything can vouch for it, so nothing in
// it may be loaded, dialled or run.
//
// A wrapper gives confidentiality and no more. That a KEK is the right one is
// proved by its key ID, which commits to it, and by the keyring's MAC; both are
// the business of package keyring.
package seal
