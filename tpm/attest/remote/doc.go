// Package remote is the remote gate: a verifier on another machine that has to
// agree before a TPM unseals.
//
// The authorization policy of a slot may demand TPM2_PolicySigned: a signature,
// by the verifier's key, over the nonce that the TPM chose for this one session.
// The verifier signs only after it has verified fresh evidence of that node, in the
// protocol of package exchange. Its context is the session's nonce, so that evidence
// for one session is of no use for another. The [Hello] names the key by which the slot
// demands a signature, and the verifier's last message is that signature, or why there
// is none.
//
// The package takes and returns values: it opens no connection and no file. The
// attester's side is given a TPM that is open already, since the session is.
package remote
