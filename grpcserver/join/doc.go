// Package join carries the join of a node over gRPC and TLS 1.3: a [Server] for the node
// that gives the KEK (V), a [Client] for the node that joins (J). What J proves, and what
// V demands, is package tpm/attest/joinproof. How both sides keep their keyrings is for
// the caller: V's is a [Host].
//
// A join has one order. J says hello; V answers with a challenge; J proves its TPM and
// its boot. Only then, and only once V's host has listed J as a node, durably, and the
// audit record is flushed, does V send the [Grant]. J ends the join with a MAC that shows
// that it has opened the keyring.
//
// Approvals are kept in the memory of the process alone: there is no file to plant one
// in, and a restart forgets them. The key of the server's certificate is made by the same
// process and dies with it.
package join

//go:generate ../internal/exchange/generate.sh
