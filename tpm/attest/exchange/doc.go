// Package exchange is the protocol by which a machine proves to another machine which
// TPM it has and how it booted. The remote gate (package remote) and the join of a node
// (package joinproof) are two purposes of it. In the words of RFC 9334:
//
//  1. Attester to verifier: [Claims] about its identity: cluster, node, endorsement key
//     (EK), a fresh attestation key (AK), storage root key (SRK), and a context that the
//     purpose defines.
//  2. Verifier to attester: [Challenge], with a nonce, the PCRs to quote, and a secret
//     that only the TPM with that EK reveals, and only while it holds that AK.
//  3. Both compute the [Transcript] of these messages and of the TLS connection.
//  4. Attester to verifier: [Evidence]: an HMAC of the transcript under the secret, a
//     quote whose extraData is the transcript, and the event logs.
//
// The purpose defines what the verifier grants afterwards. Each [Purpose] has its own
// labels, so that no message for one purpose verifies for another.
//
// The package takes and returns values: it opens no connection and no file. The caller
// opens the TPM on the attester's side.
package exchange
