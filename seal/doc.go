// Package seal defines the vocabulary of all other packages of kleidi: [Secret]
// (locked memory), [ClusterID], [KeyID], [Slot], [Wrapper], and the typed causes
// that explain why a slot does not open.
//
// The key-encryption key (KEK) is 32 random bytes. A wrapper turns the KEK into a
// slot, and a slot back into the KEK. Wrappers use a TPM, a PKCS#11 token, Vault's
// Transit engine, another KMS v2 plugin, or an age recovery recipient. A slot holds
// ciphertext and identifiers only. It is read before anything can authenticate it, so
// nothing in it may be loaded, dialled or run.
//
// A wrapper gives confidentiality and nothing else. The key ID, which commits to
// one KEK, and the keyring's MAC prove that a KEK is the right one. Package
// keyring checks both.
package seal
