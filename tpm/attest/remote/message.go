package remote

import (
	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// The parts that the remote gate shares with every exchange.
type (
	// Challenge holds the verifier's demands.
	Challenge = exchange.Challenge
	// Evidence is the attester's answer.
	Evidence = exchange.Evidence
	// Check names a check of the verifier that failed.
	Check = exchange.Check
	// Refusal is the reason why a verifier does not sign.
	Refusal = exchange.Refusal
	// Finding says why a proof did not verify; Recent finds it.
	Finding = exchange.Finding
	// Recent holds the last exchanges of a verifier.
	Recent = exchange.Recent
	// Logs returns the bytes of both event logs that explain quoted PCRs, the second empty
	// if there is none.
	Logs = exchange.Logs
)

// MaxLog bounds each event log.
const MaxLog = exchange.MaxLog

// Hello holds an attester's claims about itself.
type Hello struct {
	Cluster       []byte // cluster ID, 16 bytes
	Node          string
	EK            []byte // SubjectPublicKeyInfo of the endorsement key, DER
	EKCertificate []byte // of the endorsement key, DER; none if empty
	AK            []byte // TPMT_PUBLIC of the attestation key
	SRK           []byte // Name of the storage root key
	NonceTPM      []byte // of the policy session
	Key           []byte // Name of the verifier's key that the slot demands
}

// claims returns the claims of the exchange; its context is the session's nonce.
func (h *Hello) claims() *exchange.Claims {
	return &exchange.Claims{Cluster: h.Cluster, Node: h.Node, EK: h.EK, EKCertificate: h.EKCertificate, AK: h.AK, SRK: h.SRK, Context: h.NonceTPM}
}

func (h *Hello) check() error {
	if err := h.claims().Check(); err != nil {
		return err
	}
	return exchange.CheckSizes([]exchange.Size{
		{What: "session nonce", N: len(h.NonceTPM), Low: SessionNonceSize, High: SessionNonceSize},
		{What: "signing key's Name", N: len(h.Key), Low: exchange.NameSize, High: exchange.NameSize},
	})
}

// EKDigest returns the digest, as keys.EKDigest does, of the endorsement key that h
// claims.
func EKDigest(h *Hello) string { return keys.EKDigestOf(h.EK) }
