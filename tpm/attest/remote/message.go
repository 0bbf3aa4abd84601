package remote

import (
	"crypto"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// Bounds of what a message holds, in bytes. What is bounded by neither these nor
// a constant size is refused by its parser.
const (
	maxNode        = 253
	maxKey         = 2 << 10 // of a public key, DER or TPMT_PUBLIC
	maxCertificate = 16 << 10
	maxStatement   = 4 << 10 // of TPMS_ATTEST and TPMT_SIGNATURE
	maxCredential  = 1 << 10
	// MaxLog bounds each event log.
	MaxLog = eventlog.MaxSize
)

// Hello is what an attester claims of itself.
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

func (h *Hello) check() error {
	for _, f := range []struct {
		what      string
		n         int
		low, high int
	}{
		{"cluster ID", len(h.Cluster), 16, 16}, {"node name", len(h.Node), 1, maxNode}, {"endorsement key", len(h.EK), 1, maxKey},
		{"certificate", len(h.EKCertificate), 0, maxCertificate}, {"attestation key", len(h.AK), 1, maxKey},
		{"storage root key's Name", len(h.SRK), nameSize, nameSize}, {"session nonce", len(h.NonceTPM), SessionNonceSize, SessionNonceSize},
		{"signing key's Name", len(h.Key), nameSize, nameSize},
	} {
		if err := checkSize(f.what, f.n, f.low, f.high); err != nil {
			return err
		}
	}
	return nil
}

// Challenge is what the verifier demands.
type Challenge struct {
	Nonce      []byte
	Credential []byte // TPMS_ID_OBJECT, encrypted, for TPM2_ActivateCredential
	Secret     []byte // the seed of Credential, encrypted to the endorsement key
	Bank       crypto.Hash
	PCRs       []int
}

func (c *Challenge) check() error {
	for _, f := range []struct {
		what      string
		n         int
		low, high int
	}{
		{"nonce", len(c.Nonce), NonceSize, NonceSize}, {"credential", len(c.Credential), 1, maxCredential},
		{"encrypted secret", len(c.Secret), 1, maxCredential}, {"list of PCRs", len(c.PCRs), 1, 24},
	} {
		if err := checkSize(f.what, f.n, f.low, f.high); err != nil {
			return err
		}
	}
	if _, ok := authpolicy.Banks[c.Bank]; !ok {
		return errors.New("it names no PCR bank; want SHA-256 or SHA-384")
	}
	if !slices.IsSorted(c.PCRs) || len(slices.Compact(slices.Clone(c.PCRs))) != len(c.PCRs) || c.PCRs[0] < 0 || c.PCRs[len(c.PCRs)-1] > 23 {
		return errors.New("its PCRs are not ascending numbers from 0 to 23")
	}
	return nil
}

// Evidence is the attester's answer. The Proof comes first: until it has verified,
// the verifier need not take in the logs, which are long.
type Evidence struct {
	Proof        []byte         // see proof
	Attest       []byte         // TPMS_ATTEST of the quote
	Signature    []byte         // TPMT_SIGNATURE of it
	PCRs         map[int][]byte // the quoted values
	FirmwareLog  []byte
	UserspaceLog []byte
}

func (e *Evidence) check() error {
	for _, f := range []struct {
		what    string
		n, high int
	}{
		{"quote", len(e.Attest), maxStatement}, {"quote's signature", len(e.Signature), maxStatement}, {"set of PCR values", len(e.PCRs), 24},
		{"firmware event log", len(e.FirmwareLog), MaxLog}, {"userspace event log", len(e.UserspaceLog), MaxLog},
	} {
		if err := checkSize(f.what, f.n, 0, f.high); err != nil {
			return err
		}
	}
	return nil
}

func checkSize(what string, n, low, high int) error {
	if n < low || n > high {
		return fmt.Errorf("the %s has a size of %d, want %d to %d", what, n, low, high)
	}
	return nil
}

// proof shows that the secret of the challenge is known in this very exchange:
// HMAC-SHA256(secret, label ‖ transcript digest), 32 bytes.
func proof(secret, digest []byte) []byte {
	m := hmac.New(sha256.New, secret)
	m.Write(frame([]byte(labelProof), digest))
	return m.Sum(nil)
}

// EKDigest returns what tpm.EKDigest would of the endorsement key that h claims.
func EKDigest(h *Hello) string { return tpm.EKDigestOf(h.EK) }
