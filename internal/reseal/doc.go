// Package reseal decides in which boot states the TPM opens the KEK, and seals the KEK
// to them: the running boot, predicted next boots, states that an operator signed, and
// a suspension for a bounded number of boots.
//
// A boot state is revoked in only one way: the remaining slots are sealed for the
// following epoch, the keyring is saved, and then the TPM's counter moves. Deleting the
// bytes of a slot would revoke nothing, because somebody may have kept a copy.
//
// Package predict turns the files of the next boot into PCR values. The boot policy is
// widened to allow that boot, and narrowed again once that boot has run.
package reseal
