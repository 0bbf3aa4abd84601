package exchange

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/seal"
)

// Sizes in bytes.
const (
	// ExporterSize is the size of the TLS exporter's value.
	ExporterSize = 32
	// NonceSize is the size of the verifier's nonce.
	NonceSize = 32
	// NameSize is the size of a Name with SHA-256: the algorithm, then the digest.
	NameSize = 2 + sha256.Size
	// secretSize is the size of the secret in the credential.
	secretSize = 32
)

// Purpose is the use of an exchange. Its labels separate it from every other purpose.
// If the meaning of a label changes, so must the version in it.
type Purpose struct {
	Transcript, Proof string
	// Exporter is the label under which both sides export a value from the TLS
	// connection (RFC 8446, 7.5), with no context, ExporterSize bytes.
	Exporter string
}

// Frame joins fields so that no two lists of fields give the same bytes: each field
// follows its own length, 8 bytes, big-endian.
func Frame(fields ...[]byte) []byte {
	var b []byte
	for _, f := range fields {
		b = binary.BigEndian.AppendUint64(b, uint64(len(f)))
		b = append(b, f...)
	}
	return b
}

// Transcript holds everything that both sides must agree on. The quote and the proof
// cover its digest, so that evidence of another connection, context, node, cluster or
// moment does not verify.
type Transcript struct {
	Cluster  seal.ClusterID
	Node     string
	Nonce    []byte // the verifier's
	Exporter []byte // of the TLS connection
	Context  []byte // the purpose's
	EK       []byte // SubjectPublicKeyInfo, DER
	AK       []byte // Name
	SRK      []byte // Name
}

// Digest returns SHA-256(label ‖ cluster ID ‖ node ‖ nonce ‖ exporter ‖ context ‖
// EK ‖ AK ‖ SRK), 32 bytes.
func (p Purpose) Digest(t *Transcript) []byte {
	sum := sha256.Sum256(Frame([]byte(p.Transcript), t.Cluster[:], []byte(t.Node), t.Nonce, t.Exporter, t.Context, t.EK, t.AK, t.SRK))
	return sum[:]
}

// Answer proves knowledge of the challenge's secret in this exchange:
// HMAC-SHA256(secret, label ‖ transcript digest), 32 bytes.
func (p Purpose) Answer(secret, digest []byte) []byte {
	m := hmac.New(sha256.New, secret)
	m.Write(Frame([]byte(p.Proof), digest))
	return m.Sum(nil)
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
