package remote

import (
	"bytes"
	"encoding/hex"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
)

// TestVectorsOfRealSizes: the values that both sides of the remote gate compute from an
// exchange, for fields of real sizes.
func TestVectorsOfRealSizes(t *testing.T) {
	fill := func(first byte, n int) []byte { return bytes.Repeat([]byte{first}, n) }
	tr := exchange.Transcript{Cluster: cluster, Node: "cp-1.example", Nonce: fill(1, NonceSize), Exporter: fill(2, ExporterSize), Context: fill(3, SessionNonceSize),
		EK: fill(4, 294), AK: fill(5, exchange.NameSize), SRK: fill(6, exchange.NameSize)}
	const (
		transcript = "3f1da6d6b44fc4e56f3deb977ca2180882f835f9a7057b9da79799fa22cf1d0a"
		answer     = "d2e819c59b4e720bdb693ebf9edf0cb588b9706568316696bae59e3249dcb546"
	)
	digest := purpose.Digest(&tr)
	if got := hex.EncodeToString(digest); got != transcript {
		t.Errorf("transcript: %s, want %s", got, transcript)
	}
	if got := hex.EncodeToString(purpose.Answer(fill(7, 32), digest)); got != answer {
		t.Errorf("proof: %s, want %s", got, answer)
	}
}
