// Package lifecycle makes a node's keyring and replaces it as a whole: init, rotate,
// recover, restore, a new TPM, and the small operations on the stored file (save, verify,
// reload).
//
// Each of them ends with a keyring that opens, even where a power failure interrupts it:
// the keyring is stored first, then the anchor moves, and only then is a new key ID
// announced. Recover and restore bring in a keyring that the anchor does not know, so they
// say what they trust instead, and finish by rotating to a fresh KEK if there is room.
package lifecycle
