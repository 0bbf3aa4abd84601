// Package verifier carries the remote gate over gRPC and TLS 1.3: a [Server] for the
// verifier's machine, a [Client] for the nodes. Package tpm/attest/remote says what is
// proven, and how.
//
// One bidirectional stream is one exchange. The nodes have no credentials except their
// TPMs, so anybody may connect. Therefore the messages before the proof are small and
// cheap, the event logs come only after it, and every peer has a limited share of
// connections and exchanges. The TLS exporter's value is part of the transcript that
// both sides sign, so an exchange can't be relayed over another connection.
package verifier

//go:generate ../internal/exchange/generate.sh
