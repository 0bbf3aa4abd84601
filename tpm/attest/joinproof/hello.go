package joinproof

import (
	"crypto"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
)

// ExporterLabel is the label under which both sides export a value from the TLS
// connection.
const ExporterLabel = "EXPORTER-kleidi-join-v1"

// purpose separates a join from every other exchange.
var purpose = exchange.Purpose{
	Transcript: "kleidi join transcript v1",
	Proof:      "kleidi join proof v1",
	Exporter:   ExporterLabel,
}

const (
	maxFormats = 16
	maxRef     = 32 // of a policyRef, in bytes
)

// Hello holds a joining node's claims about itself.
type Hello struct {
	Cluster       []byte // cluster ID, 16 bytes
	Node          string
	EK            []byte // SubjectPublicKeyInfo of the endorsement key, DER
	EKCertificate []byte // of the endorsement key, DER; none if empty
	AK            []byte // TPMT_PUBLIC of the attestation key
	SRK           []byte // TPMT_PUBLIC of the storage root key
	Terms
}

// Terms are the demands of the joining node's future TPM slots, and the keyring formats
// that the node reads.
type Terms struct {
	Formats    []int // of keyrings, ascending
	Bank       crypto.Hash
	PCRs       []int // ascending
	EpochIndex uint32
	Epoch      uint64
	// Verifier is the public area (TPMT_PUBLIC) of the key of the remote verifier that
	// must agree to each opening; empty means no verifier.
	Verifier []byte
	// Signer is the public area of the key that signs the boot states; empty means no
	// signer. Ref is signed with each boot state.
	Signer, Ref []byte
}

// Context returns the context of the exchange: formats ‖ bank ‖ PCRs ‖ epoch index ‖
// epoch value ‖ verifier ‖ signer ‖ ref. Numbers are big-endian: the formats and the
// value of 8 bytes each, the index of 4; the bank is its TPM_ALG_ID, 2 bytes, a PCR one.
func (t *Terms) Context() []byte {
	var formats, pcrs []byte
	for _, f := range t.Formats {
		formats = binary.BigEndian.AppendUint64(formats, uint64(f))
	}
	for _, i := range t.PCRs {
		pcrs = append(pcrs, byte(i))
	}
	return exchange.Frame(formats, binary.BigEndian.AppendUint16(nil, uint16(authpolicy.Banks[t.Bank])), pcrs,
		binary.BigEndian.AppendUint32(nil, t.EpochIndex), binary.BigEndian.AppendUint64(nil, t.Epoch), t.Verifier, t.Signer, t.Ref)
}

// check refuses terms in any form but the one that a joining node sends, so that equal
// terms have one context.
func (t *Terms) check() error {
	if err := exchange.CheckSizes([]exchange.Size{
		{What: "list of formats", N: len(t.Formats), Low: 1, High: maxFormats}, {What: "verifier's key", N: len(t.Verifier), High: exchange.MaxKey},
		{What: "signer's key", N: len(t.Signer), High: exchange.MaxKey}, {What: "signer's reference", N: len(t.Ref), High: maxRef},
	}); err != nil {
		return err
	}
	last := 0
	for _, f := range t.Formats {
		if f <= last {
			return errors.New("its formats are not positive and ascending")
		}
		last = f
	}
	if _, ok := authpolicy.Banks[t.Bank]; !ok {
		return errors.New("it names no PCR bank; want SHA-256 or SHA-384")
	}
	if len(t.Signer) == 0 && len(t.Ref) > 0 {
		return errors.New("it has a reference without a signer")
	}
	return exchange.CheckPCRs(t.PCRs)
}

// claims returns the claims of the exchange. The storage root key must have the
// template: the Name then identifies the parent of every object that is wrapped for
// this key.
func (h *Hello) claims() (*exchange.Claims, error) {
	srk, err := tpm.ParseSRK(h.SRK)
	if err != nil {
		return nil, err
	}
	name, err := tpm2.ObjectName(srk)
	if err != nil {
		return nil, fmt.Errorf("storage root key: %w", err)
	}
	return &exchange.Claims{Cluster: h.Cluster, Node: h.Node, EK: h.EK, EKCertificate: h.EKCertificate, AK: h.AK, SRK: name.Buffer, Context: h.Context()}, nil
}

// NewHello returns the machine's claims.
func NewHello(m *exchange.Machine, cluster seal.ClusterID, node string, t Terms) (*Hello, error) {
	c := m.Claims(cluster, node)
	h := &Hello{Cluster: c.Cluster, Node: c.Node, EK: c.EK, EKCertificate: c.EKCertificate, AK: c.AK, SRK: tpm2.Marshal(m.SRK.Public), Terms: t}
	if err := t.check(); err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	claims, err := h.claims()
	if err == nil {
		err = claims.Check()
	}
	if err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	return h, nil
}

// Respond answers V's challenge on the TLS connection with that exporter value. It also
// returns the digest of the transcript, which identifies this join in its last message.
func Respond(m *exchange.Machine, h *Hello, c *exchange.Challenge, exporter []byte, logs exchange.Logs) (e *exchange.Evidence, transcript []byte, err error) {
	if err := c.Check(); err != nil {
		return nil, nil, seal.Errorf(seal.CauseUnavailable, "check that the address leads to kleidi serve of this version", "the challenge of the node that gives the KEK: %w", err)
	}
	claims, err := h.claims()
	if err != nil {
		return nil, nil, fmt.Errorf("join: %w", err)
	}
	return purpose.Respond(m, claims, c, exporter, logs)
}
