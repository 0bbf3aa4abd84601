// Package remote is the remote gate: a verifier on another machine that has to
// agree before a TPM unseals.
//
// The authorization policy of a slot may demand TPM2_PolicySigned: a signature,
// by the verifier's key, over the nonce that the TPM chose for this one session.
// The verifier signs only after it has verified fresh evidence of that node. What
// happens, in the words of RFC 9334:
//
//  1. Attester to verifier: [Hello], which claims who it is: cluster, node,
//     endorsement key (EK), a fresh attestation key (AK), storage root key (SRK)
//     and the session's nonce.
//  2. Verifier to attester: [Challenge], with a nonce, the PCRs that the node's
//     boot policy demands, and a secret that only the TPM of that EK gives away,
//     and only where it holds that AK.
//  3. Both compute the [Transcript] of all of it and of the TLS connection.
//  4. Attester to verifier: [Evidence]: an HMAC of the transcript under the
//     secret, a quote whose extraData is the transcript, and the event logs.
//  5. Verifier to attester: the signature, or why there is none.
//
// The package takes and returns values: it opens no connection and no file. The
// attester's side is given a TPM that is open already, since the session is.
package remote
