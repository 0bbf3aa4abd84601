// Package ekcert verifies endorsement key (EK) certificates: a TPM maker's statement
// that a key is in a TPM of that maker (TCG EK Credential Profile for TPM Family 2.0).
// The certificate says nothing about the machine that the TPM is in. So it is evidence
// in addition to an operator's approval of an EK, or a condition for such an approval,
// but no substitute for it.
//
// EK certificates are older and odder than those of the web. The tolerated deviations
// are data: see the table in quirks.go. The package refuses everything else that
// crypto/x509 refuses.
//
// The package does not consult revocation lists: it opens no connection, and a control
// plane must start without its vendors. To exclude a maker or a key, leave it out of
// the bundle or of the allow-list.
package ekcert
