// Package exchange carries exchanges of package tpm/attest/exchange over gRPC and TLS
// 1.3, for any purpose. The remote gate (package verifier) and the join of a node
// (package join) are two services over it.
//
// One bidirectional stream is one exchange, and a connection carries one exchange. The
// peers have no credentials except their TPMs, so anybody may connect. Therefore the
// messages before the proof are small and cheap, the event logs come only after it, and
// every peer has a limited share of connections and exchanges. The TLS exporter's value
// is part of the transcript that both sides sign, so an exchange can't be relayed over
// another connection.
package exchange

//go:generate ./generate.sh
