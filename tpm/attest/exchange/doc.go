// Package exchange is the protocol in which a machine proves to another one which TPM
// it has and how it booted. The remote gate (package remote) and the join of a node
// (package joinproof) are two purposes of it. What happens, in the words of RFC 9334:
//
//  1. Attester to verifier: [Claims] of who it is: cluster, node, endorsement key (EK), a
//     fresh attestation key (AK), storage root key (SRK), and a context that the purpose
//     gives.
//  2. Verifier to attester: [Challenge], with a nonce, the PCRs to quote, and a secret
//     that only the TPM of that EK gives away, and only where it holds that AK.
//  3. Both compute the [Transcript] of all of it and of the TLS connection.
//  4. Attester to verifier: [Evidence]: an HMAC of the transcript under the secret, a
//     quote whose extraData is the transcript, and the event logs.
//
// What the verifier then gives is the purpose's. A [Purpose] has labels of its own, so
// that nothing that was said for one purpose verifies for another.
//
// The package takes and returns values: it opens no connection and no file. The
// attester's side is given a TPM that is open already.
package exchange
