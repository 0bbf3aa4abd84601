// Package remote is the remote gate: a verifier on another machine that must agree
// before a TPM unseals.
//
// The authorization policy of a slot may demand TPM2_PolicySigned: a signature by the
// verifier's key over the nonce that the TPM chose for this one session. The verifier
// signs only after it has verified fresh evidence of that node, in the protocol of
// package exchange. The context of the exchange is the session's nonce, so that
// evidence for one session is useless for another. The [Hello] names the key whose
// signature the slot demands. The verifier's last message is that signature, or the
// reason for a refusal.
//
// The package takes and returns values: it opens no connection and no file. The
// attester's side receives an open TPM, because the policy session is already open on
// it.
package remote
