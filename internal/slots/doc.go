// Package slots adds, removes, rewraps and tests single slots of a keyring, and makes the
// credentials that a slot's backend needs: a PIN sealed to the TPM, a client key for
// Vault.
//
// A slot is stored only after the configured wrapper has opened it (except a recovery
// slot, whose identity is elsewhere). A removal is refused if no remaining slot would
// open the keyring. The rules that need no hardware, such as those of two-of-two, are in
// package slotview.
package slots
