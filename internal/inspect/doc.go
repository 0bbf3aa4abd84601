// Package inspect judges files that were saved on some machine: an event log, PCR values,
// attestation evidence. It needs no TPM and no node, and it changes nothing.
//
// Its verdicts are those of serve's own gate, so an operator can try a boot policy on a
// workstation before a node depends on it.
package inspect
