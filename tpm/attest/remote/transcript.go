package remote

import (
	"crypto/sha256"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
)

// Domain separation. A change needs a new version in the label, and old slots keep the
// old reference, which is part of their authorization policy.
const (
	labelPolicyRef = "kleidi remote gate policyref v1"
	// ExporterLabel is the label under which both sides export a value from the TLS
	// connection (RFC 8446, 7.5), with no context, ExporterSize bytes.
	ExporterLabel = "EXPORTER-kleidi-remote-gate-v1"
)

// purpose is the purpose of the remote gate. Its context is the policy session's nonce.
var purpose = exchange.Purpose{
	Transcript: "kleidi remote gate transcript v1",
	Proof:      "kleidi remote gate proof v1",
	Exporter:   ExporterLabel,
}

// Sizes in bytes.
const (
	// ExporterSize is the size of the TLS exporter's value.
	ExporterSize = exchange.ExporterSize
	// NonceSize is the size of the verifier's nonce.
	NonceSize = exchange.NonceSize
	// SessionNonceSize is the size of the nonce that a TPM chose for a session of
	// kleidi. A verifier signs no nonce of another size, see [authpolicy.SignedHash].
	SessionNonceSize = authpolicy.NonceSize
)

// PolicyRef returns the policyRef of a node's TPM2_PolicySigned, 32 bytes:
// SHA-256(label ‖ cluster ID ‖ node). Because of it, a signature for one node can't
// open a slot of another node.
func PolicyRef(cluster seal.ClusterID, node string) []byte {
	sum := sha256.Sum256(exchange.Frame([]byte(labelPolicyRef), cluster[:], []byte(node)))
	return sum[:]
}
