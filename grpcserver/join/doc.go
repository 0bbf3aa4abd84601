// Package join carries the join of a node over gRPC and TLS 1.3: a [Server] for the
// node that gives the KEK (V), a [Client] for the joining node (J). Package
// tpm/attest/joinproof defines what J proves and what V demands. The callers keep the
// keyrings of both sides: V's caller is a [Host].
//
// A join has one order. J says hello; V answers with a challenge; J proves its TPM and
// its boot. V sends the [Grant] only after that, after its host has durably listed J as
// a node, and after the audit record is flushed. J ends the join with a MAC that shows
// that it has opened the keyring.
//
// Approvals exist only in the memory of the process: an attacker can't plant one in a
// file, and a restart forgets them. The same process makes the key of the server's
// certificate, and the key dies with it.
package join

//go:generate ../internal/exchange/generate.sh
