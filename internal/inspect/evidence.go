package inspect

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
)

// ParseNonce returns a random nonce for an empty text.
func ParseNonce(s string) ([]byte, error) {
	if s == "" {
		b := make([]byte, 32)
		rand.Read(b)
		return b, nil
	}
	b, err := hex.DecodeString(s)
	if err != nil || len(b) < minNonce || len(b) > maxNonce {
		return nil, fmt.Errorf("--nonce: want %d to %d bytes in hexadecimal, such as openssl rand -hex 32 prints", minNonce, maxNonce)
	}
	return b, nil
}

// Sizes of a nonce, in bytes: the smallest that can't be guessed, and the largest that a
// TPM accepts.
const (
	minNonce = 16
	maxNonce = 64
)

// KeyDigest returns the digest of an attestation key.
func KeyDigest(e *attest.Evidence) string {
	return fmt.Sprintf("sha256:%x", sha256.Sum256(e.Quote.AKPublic))
}

// EvidenceVerdict is a verdict on saved evidence, with the facts that the evidence
// can't prove.
type EvidenceVerdict struct {
	*bootpolicy.Verdict
	// AttestationKey is the SHA-256 digest of the key's public area.
	AttestationKey string `json:"attestationKey"`
	// Fresh says that the quote has the given nonce.
	Fresh bool `json:"fresh"`
}

// JudgeEvidence judges the evidence in a file by the boot policy in another one. Unless
// nonce is empty, the quote must have been made for it. An error means that the evidence
// proves nothing; a refused boot is no error.
func JudgeEvidence(policy, file, nonce string) (*EvidenceVerdict, error) {
	p, err := files.ReadAnyBootPolicy(policy)
	if err != nil {
		return nil, err
	}
	b, err := files.Read(file, attest.MaxEvidence)
	if err != nil {
		return nil, err
	}
	e, err := attest.ParseEvidence(b, p.Hash())
	if err != nil {
		return nil, fmt.Errorf("%s: %w; want what kleidi bootpolicy evidence writes", file, err)
	}
	quoted, err := e.Nonce()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if nonce != "" {
		want, err := ParseNonce(nonce)
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(want, quoted) {
			return nil, fmt.Errorf("%s: the quote was not made for this nonce; ask for evidence with --nonce %s", file, nonce)
		}
	}
	r, err := attest.Verify(e, quoted, p.Hash(), p.Demanded())
	if err != nil {
		fresh := fmt.Sprintf("ask for fresh evidence over PCR %s (%s), and if it stays the machine or the file was tampered with", slotview.JoinPCRs(p.Demanded()), p.Bank)
		return nil, fmt.Errorf("%s: %w; %s", file, err, hintOf(err, fresh))
	}
	return &EvidenceVerdict{bootpolicy.Judge(p, r.Log, r.PCRs), KeyDigest(e), nonce != ""}, nil
}

// hintOf returns the remedy for evidence that proves nothing however often it is saved.
// For other evidence it returns again, the hint to save the evidence once more.
func hintOf(err error, again string) string {
	if r := attest.RemedyOf(err); r.Permanent {
		return r.Hint("the boot policy")
	}
	return again
}
