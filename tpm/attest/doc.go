// Package attest gathers evidence of how a machine booted, and verifies it (in the
// words of RFC 9334: attester, evidence, verifier, result).
//
// Evidence is a quote over exactly the demanded PCRs, with a fresh nonce, and the event
// logs that lead to the quoted values.
//
// On the machine itself attestation explains and the TPM's authorization policy
// enforces, because an attacker who can replace kleidi can skip this package.
// Attestation enforces if another machine verifies.
package attest
