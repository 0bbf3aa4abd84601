// Package ekcert verifies endorsement key (EK) certificates: a TPM maker's word
// that a key is in a TPM of its making (TCG EK Credential Profile for TPM Family
// 2.0). It says nothing about which machine the TPM is in, so it is evidence
// beside an operator's approval of an EK, or the condition under which an EK may
// be approved, and no substitute for one.
//
// EK certificates are older and odder than those of the web. What deviates and is
// tolerated is data: see the table in quirks.go. Everything else that crypto/x509
// refuses stays refused.
//
// Revocation lists are not consulted: nothing here opens a connection, and a
// control plane must start without its vendors. Who is to be kept out is left out
// of the bundle or of the allow-list.
package ekcert
