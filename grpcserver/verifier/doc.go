// Package verifier carries the remote gate over gRPC and TLS 1.3: a [Server] for
// the verifier's machine, a [Client] for the nodes. What is proven, and how, is
// package tpm/attest/remote.
//
// One bidirectional stream is one exchange. The nodes have no credentials but
// their TPMs, so anybody may connect: what comes before the proof is small and
// cheap, the event logs are taken in only after it, and every peer has its share
// of connections and exchanges. The TLS exporter's value is part of what both
// sides sign, so that an exchange can't be relayed over another connection.
package verifier

//go:generate ../internal/exchange/generate.sh
