package remote

import (
	"crypto/sha256"
	"encoding/binary"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
)

// Domain separation. A change is a new version, and old slots keep the old
// reference: it is part of their authorization policy.
const (
	labelTranscript = "kleidi remote gate transcript v1"
	labelPolicyRef  = "kleidi remote gate policyref v1"
	labelProof      = "kleidi remote gate proof v1"
	// ExporterLabel is what both sides export from the TLS connection (RFC 8446,
	// 7.5), with no context, ExporterSize bytes.
	ExporterLabel = "EXPORTER-kleidi-remote-gate-v1"
)

// Sizes in bytes.
const (
	// ExporterSize is the size of the TLS exporter's value.
	ExporterSize = 32
	// NonceSize is the size of the verifier's nonce.
	NonceSize = 32
	// SessionNonceSize is the size of the nonce that a TPM chose for a session of
	// kleidi. No other is signed, see [authpolicy.SignedHash].
	SessionNonceSize = authpolicy.NonceSize
	// nameSize is the size of a Name by SHA-256: the algorithm, then the digest.
	nameSize = 2 + sha256.Size
	// secretSize is the size of the secret in the credential.
	secretSize = 32
)

// frame joins fields so that no two lists of fields give the same bytes: each
// field follows its length, 8 bytes, big-endian.
func frame(fields ...[]byte) []byte {
	var b []byte
	for _, f := range fields {
		b = binary.BigEndian.AppendUint64(b, uint64(len(f)))
		b = append(b, f...)
	}
	return b
}

// Transcript is all that both sides have to agree on. Its digest is in the quote
// and under the proof, so that evidence of another connection, session, node,
// cluster or moment does not verify.
type Transcript struct {
	Cluster  seal.ClusterID
	Node     string
	Nonce    []byte // the verifier's
	Exporter []byte // of the TLS connection
	NonceTPM []byte // the policy session's
	EK       []byte // SubjectPublicKeyInfo, DER
	AK       []byte // Name
	SRK      []byte // Name
}

// Digest returns SHA-256(label ‖ cluster ID ‖ node ‖ nonce ‖ exporter ‖ nonceTPM ‖
// EK ‖ AK ‖ SRK), 32 bytes.
func (t *Transcript) Digest() []byte {
	sum := sha256.Sum256(frame([]byte(labelTranscript), t.Cluster[:], []byte(t.Node), t.Nonce, t.Exporter, t.NonceTPM, t.EK, t.AK, t.SRK))
	return sum[:]
}

// PolicyRef returns the policyRef of a node's TPM2_PolicySigned, 32 bytes:
// SHA-256(label ‖ cluster ID ‖ node). It keeps a signature for one node from
// opening a slot of another.
func PolicyRef(cluster seal.ClusterID, node string) []byte {
	sum := sha256.Sum256(frame([]byte(labelPolicyRef), cluster[:], []byte(node)))
	return sum[:]
}

// nameOf returns the Name of a public area.
func nameOf(public *tpm2.TPMTPublic) ([]byte, error) {
	name, err := tpm2.ObjectName(public)
	if err != nil {
		return nil, err
	}
	return name.Buffer, nil
}

// qualifiedName returns the qualified name of a child, by Name, of a primary key
// of the owner hierarchy (TPM 2.0 Library, Part 1, 16.6).
func qualifiedName(primary, child []byte) []byte {
	parent := binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMRHOwner))
	for _, name := range [][]byte{primary, child} {
		sum := sha256.Sum256(append(parent, name...))
		parent = append(binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMAlgSHA256)), sum[:]...)
	}
	return parent
}
