// Package exchange carries exchanges of package tpm/attest/exchange over gRPC and TLS
// 1.3, whatever they are for: the remote gate (package verifier) and the join of a node
// (package join) are two services over it.
//
// One bidirectional stream is one exchange, and a connection carries one. The peers have
// no credentials but their TPMs, so anybody may connect: what comes before the proof is
// small and cheap, the event logs are taken in only after it, and every peer has its
// share of connections and exchanges. The TLS exporter's value is part of what both
// sides sign, so that an exchange can't be relayed over another connection.
package exchange

//go:generate ./generate.sh
