// Package lifecycle replaces a node's keyring as a whole: rotate, recover, restore, a new
// TPM, and the small operations on the stored file (save, verify, reload). Package
// founding makes the first one.
//
// Each operation ends with a keyring that opens, even if a power failure interrupts it:
// it stores the keyring first, then moves the anchor, and only then announces a new key
// ID. Recover and restore install a keyring that the anchor does not know. So they
// state what they trust instead, and finish by rotating to a fresh KEK if there is
// room.
package lifecycle
