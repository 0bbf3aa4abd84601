// Package tpm talks to one TPM 2.0: it seals KEKs to the TPM and quotes its PCRs. Its
// [Wrapper] is kleidi's TPM wrapper.
//
// A [Device] is opened for an operation and closed after it. All sessions that
// carry a key are salted to the storage root key whose Name the slot records,
// and encrypt their parameters. So neither an eavesdropper on the bus nor an
// impostor in the TPM's place learns the key.
//
// Before it unseals, the TPM itself enforces an authorization policy. Package
// authpolicy computes it.
package tpm
