// Package tpm is kleidi's TPM wrapper: it seals KEKs to one TPM 2.0. Package device opens
// the TPM, package keys has its keys.
//
// All sessions that carry a key are salted to the storage root key whose Name the slot
// records, and encrypt their parameters. So neither an eavesdropper on the bus nor an
// impostor in the TPM's place learns the key.
//
// Before it unseals, the TPM itself enforces an authorization policy. Package
// authpolicy computes it.
package tpm
