// Package status answers kleidi status: whether the keyring is open and why not, every slot
// with its binding and whether it opens now, what attestation says, and what an operator
// should do.
//
// A report changes nothing. The caller chooses what it tries, because asking a token or a
// server takes time: nothing, the TPM, or every wrapper.
package status
