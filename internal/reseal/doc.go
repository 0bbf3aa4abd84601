// Package reseal decides which boot states the TPM opens the KEK in, and seals it to them:
// the running boot, predicted next boots, states that an operator signed, and a suspension
// for a bounded number of boots.
//
// A boot state is taken away in one way only: the remaining slots are sealed for the
// following epoch, the keyring is saved, and then the TPM's counter moves. Deleting the
// bytes of a slot would revoke nothing, since somebody may have kept a copy.
//
// The files of a coming boot are turned into PCR values by package predict. The boot policy
// is widened to allow that boot, and narrowed again once it has run.
package reseal
