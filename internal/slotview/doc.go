// Package slotview reads a list of slots: their names, what they are sealed to, what they
// demand of this machine, which slots are missing, and which changes would break
// two-of-two.
//
// It is pure. A Reader knows three facts of a node's configuration and neither its TPM
// nor its disk, so every rule here can be tested with a table. A check returns an error
// that tells the operator what to do instead; a report returns the sentences that a
// command prints.
//
// The slots may come from a keyring that nothing authenticates. Nothing in them is
// dialled, loaded or run, and a slot that can't be read is shown as unreadable.
package slotview
