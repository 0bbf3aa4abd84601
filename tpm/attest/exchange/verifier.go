package exchange

import (
	"bytes"
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Check names a check of the verifier that failed.
type Check string

// The checks of every purpose, in their order. A purpose may have more.
const (
	CheckMessage       Check = "message"
	CheckCluster       Check = "cluster"
	CheckNode          Check = "node"
	CheckEK            Check = "endorsement key"
	CheckEKCertificate Check = "endorsement key certificate"
	CheckAK            Check = "attestation key"
	CheckProof         Check = "proof"
	CheckEvidence      Check = "evidence"
	CheckSRK           Check = "storage root key"
	CheckBootPolicy    Check = "boot policy"
)

// Refusal is the reason for a verifier's no.
type Refusal struct {
	Check Check
	Err   error
	Hint  string // what an operator should do next
}

// Error names the check, what is wrong and what to do next.
func (r *Refusal) Error() string { return string(r.Check) + ": " + r.Err.Error() + "; " + r.Hint }

// Unwrap returns Err.
func (r *Refusal) Unwrap() error { return r.Err }

// Refuse returns a [*Refusal].
func Refuse(c Check, hint, format string, args ...any) error {
	return &Refusal{Check: c, Err: fmt.Errorf(format, args...), Hint: hint}
}

// HintForged is the hint for a message that no kleidi of this version sends.
const HintForged = "check that both sides run the same version of kleidi; if they do, find out what runs in the node's place"

// Pending is an exchange after its challenge. It can be answered once.
type Pending struct {
	purpose Purpose
	claims  Claims
	bank    crypto.Hash
	pcrs    []int
	digest  []byte // of the transcript
	akName  []byte
	// transcript is what digest covers.
	transcript Transcript
	secret     []byte
	proven     bool
	spent      bool
}

// Begin makes the challenge of an exchange on a TLS connection with that exporter
// value. The caller has already found that the claims belong to the cluster and to a
// node whose endorsement key it knows. Begin demands that a credential can be made for
// that key, and that the attestation key has kleidi's template (restricted: the key
// signs nothing but statements of its TPM). The challenge commits to the Name of that
// attestation key, and demands a quote over these PCRs.
func (p Purpose) Begin(c *Claims, exporter []byte, bank crypto.Hash, pcrs []int) (*Pending, *Challenge, error) {
	if len(exporter) != ExporterSize {
		return nil, nil, errors.New("no value of the TLS exporter") // a fault of the transport
	}
	ek, err := encapsulationKey(c.EK)
	if err != nil {
		return nil, nil, Refuse(CheckEK, HintForged, "%w", err)
	}
	akName, err := checkAK(c.AK)
	if err != nil {
		return nil, nil, Refuse(CheckAK, HintForged, "%w", err)
	}
	pending := &Pending{purpose: p, claims: *c, bank: bank, pcrs: pcrs, akName: akName, secret: make([]byte, secretSize)}
	rand.Read(pending.secret)
	challenge := &Challenge{Nonce: make([]byte, NonceSize), Bank: bank, PCRs: pcrs}
	rand.Read(challenge.Nonce)
	if challenge.Credential, challenge.Secret, err = makeCredential(ek, akName, pending.secret); err != nil {
		return nil, nil, err
	}
	pending.transcript = Transcript{Cluster: seal.ClusterID(c.Cluster), Node: c.Node, Nonce: bytes.Clone(challenge.Nonce), Exporter: exporter, Context: c.Context,
		EK: c.EK, AK: akName, SRK: c.SRK}
	pending.digest = p.Digest(&pending.transcript)
	return pending, challenge, nil
}

// checkAK demands exactly the template, and returns the Name. With this template the
// Name proves as much as creation data would: the TPM with the private part made the
// key.
func checkAK(public []byte) ([]byte, error) {
	p, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(tpm2.Marshal(p), public) || !keys.IsAK(p) {
		return nil, errors.New("it is not a restricted signing key as kleidi makes it")
	}
	return nameOf(p)
}

// Transcript returns the digest of the transcript.
func (p *Pending) Transcript() []byte { return p.digest }

// Prove demands that the answer comes from the TPM with that endorsement key, that this
// TPM holds the attestation key, and that both sides saw the same exchange. Only then
// does the attester know the secret and compute the same transcript.
func (p *Pending) Prove(answer []byte) error {
	if p.spent {
		return Refuse(CheckProof, HintForged, "the challenge was answered before")
	}
	p.spent = true
	if !hmac.Equal(p.purpose.Answer(p.secret, p.digest), answer) {
		return Refuse(CheckProof, HintForged, "the attestation key is not on the TPM with that endorsement key, or somebody is intercepting the connection")
	}
	p.proven = true
	return nil
}

// Judge demands, in this order: the proof was verified; the quote is fresh (its
// extraData is the transcript), by that attestation key and over exactly the PCRs of
// the challenge, and the logs lead to it (see [attest.Verify]); the attestation key is
// a child of the claimed storage root key, a primary key of the owner hierarchy; the
// boot policy accepts the boot.
func (p *Pending) Judge(e *Evidence, policy *bootpolicy.BootPolicy) (*attest.Result, error) {
	if !p.proven {
		return nil, Refuse(CheckProof, HintForged, "the challenge was not answered")
	}
	p.proven = false // no second try
	if err := e.check(); err != nil {
		return nil, Refuse(CheckMessage, HintForged, "%w", err)
	}
	evidence := &attest.Evidence{FirmwareLog: e.FirmwareLog, UserspaceLog: e.UserspaceLog,
		Quote: keys.Quote{AKPublic: p.claims.AK, Attest: e.Attest, Signature: e.Signature, Bank: p.bank, PCRs: e.PCRs}}
	result, err := attest.Verify(evidence, p.digest, p.bank, p.pcrs)
	if err != nil {
		return nil, Refuse(CheckEvidence, attest.RemedyOf(err).Hint("the node's boot policy"), "%w", err)
	}
	if err := p.checkSRK(e.Attest); err != nil {
		return nil, Refuse(CheckSRK, HintForged, "%w", err)
	}
	demanded := eventlog.PCRs{} // the purpose may have asked for more PCRs
	for _, i := range policy.Demanded() {
		if v, quoted := result.PCRs[i]; quoted {
			demanded[i] = v
		}
	}
	if err := bootpolicy.Judge(policy, result.Log, demanded).Err(); err != nil {
		return nil, Refuse(CheckBootPolicy, "the boot policy to edit is the one on the verifier's machine", "%w", err)
	}
	return result, nil
}

// checkSRK checks the qualifiedSigner of a verified quote, which names every ancestor
// of the attestation key.
func (p *Pending) checkSRK(quote []byte) error {
	a, err := tpm2.Unmarshal[tpm2.TPMSAttest](quote)
	if err != nil {
		return err
	}
	if !bytes.Equal(a.QualifiedSigner.Buffer, qualifiedName(p.claims.SRK, p.akName)) {
		return errors.New("the attestation key is not a child of it in the owner hierarchy")
	}
	return nil
}
