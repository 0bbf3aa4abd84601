package remote

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// Verifier decides for the nodes of one cluster. It keeps nothing between
// exchanges and may be used concurrently.
type Verifier struct {
	Cluster seal.ClusterID
	// Keys are what to sign with. A node says which one its slot demands: there is
	// more than one while nodes move from one to the next.
	Keys  []*Key
	Nodes map[string]Registration // by node name
	// EKCertificate verifies the certificate of an endorsement key, both DER; nil
	// demands none. It is extra evidence: the registered digest decides which TPM
	// it is, the certificate that a manufacturer made it.
	EKCertificate func(certificate, spki []byte) error
}

// Registration is what an operator has said of a node.
type Registration struct {
	EK         string // as tpm.EKDigest returns it
	BootPolicy *bootpolicy.BootPolicy
}

// Check names what a verifier found wanting.
type Check string

// The checks, in their order.
const (
	CheckMessage       Check = "message"
	CheckCluster       Check = "cluster"
	CheckNode          Check = "node"
	CheckKey           Check = "signing key"
	CheckEK            Check = "endorsement key"
	CheckEKCertificate Check = "endorsement key certificate"
	CheckAK            Check = "attestation key"
	CheckProof         Check = "proof"
	CheckEvidence      Check = "evidence"
	CheckSRK           Check = "storage root key"
	CheckBootPolicy    Check = "boot policy"
)

// Checks returns all of them, in their order.
func Checks() []Check {
	return []Check{CheckMessage, CheckCluster, CheckNode, CheckKey, CheckEK, CheckEKCertificate, CheckAK, CheckProof, CheckEvidence, CheckSRK, CheckBootPolicy}
}

// Refusal is why a verifier does not sign.
type Refusal struct {
	Check Check
	Err   error
	Hint  string // what an operator does next
}

// Error names the check, what is wrong and what to do next.
func (r *Refusal) Error() string { return string(r.Check) + ": " + r.Err.Error() + "; " + r.Hint }

// Unwrap returns Err.
func (r *Refusal) Unwrap() error { return r.Err }

func refuse(c Check, hint, format string, args ...any) error {
	return &Refusal{Check: c, Err: fmt.Errorf(format, args...), Hint: hint}
}

const (
	hintForged   = "see that kleidi on both sides is of the same version; if it is, find out what runs in the node's place"
	hintRegister = "compare it with nodes in the verifier's configuration; kleidi status on the node shows its name and EK"
)

// Pending is an exchange whose challenge was made. It can be answered once.
type Pending struct {
	verifier *Verifier
	node     Registration
	key      *Key
	hello    *Hello
	digest   []byte // of the transcript
	akName   []byte
	secret   []byte
	proven   bool
	spent    bool
}

// Challenge begins an exchange on a TLS connection with that exporter value. It
// demands, in this order: the claims have sizes that they can have; the cluster is
// this verifier's; the node is registered; the verifier has the key that the slot
// demands; the endorsement key is the registered one, and its certificate verifies
// where one is demanded; the attestation key is of the template that kleidi makes (restricted: it signs nothing but statements
// of its TPM). The challenge then commits to that attestation key's Name.
func (v *Verifier) Challenge(h *Hello, exporter []byte) (*Pending, *Challenge, error) {
	if len(exporter) != ExporterSize {
		return nil, nil, errors.New("no value of the TLS exporter") // a fault of the transport
	}
	node, key, err := v.identify(h)
	if err != nil {
		return nil, nil, err
	}
	ek, err := encapsulationKey(h.EK)
	if err != nil {
		return nil, nil, refuse(CheckEK, hintForged, "%w", err)
	}
	akName, err := checkAK(h.AK)
	if err != nil {
		return nil, nil, refuse(CheckAK, hintForged, "%w", err)
	}
	p := &Pending{verifier: v, node: node, key: key, hello: h, akName: akName, secret: make([]byte, secretSize)}
	rand.Read(p.secret)
	c := &Challenge{Nonce: make([]byte, NonceSize), Bank: node.BootPolicy.Hash(), PCRs: node.BootPolicy.Demanded()}
	rand.Read(c.Nonce)
	if c.Credential, c.Secret, err = makeCredential(ek, akName, p.secret); err != nil {
		return nil, nil, err
	}
	t := &Transcript{Cluster: v.Cluster, Node: h.Node, Nonce: c.Nonce, Exporter: exporter, NonceTPM: h.NonceTPM, EK: h.EK, AK: akName, SRK: h.SRK}
	p.digest = t.Digest()
	return p, c, nil
}

// identify returns what is registered of the node that h claims to be, and the key
// that it asks for.
func (v *Verifier) identify(h *Hello) (Registration, *Key, error) {
	if err := h.check(); err != nil {
		return Registration{}, nil, refuse(CheckMessage, hintForged, "%w", err)
	}
	if !bytes.Equal(h.Cluster, v.Cluster[:]) {
		return Registration{}, nil, refuse(CheckCluster, "see clusterID in the verifier's configuration; kleidi status on the node shows its own", "the node is of cluster %x", h.Cluster)
	}
	node, ok := v.Nodes[h.Node]
	if !ok {
		return Registration{}, nil, refuse(CheckNode, hintRegister, "node %.64q is not registered", h.Node)
	}
	i := slices.IndexFunc(v.Keys, func(k *Key) bool { return bytes.Equal(k.name, h.Key) })
	if i < 0 {
		return Registration{}, nil, refuse(CheckKey, "see signingKey and formerSigningKeys in the verifier's configuration, and tpm.verifier.publicKey in the node's",
			"the slot demands a signature by another key than this verifier has")
	}
	if got := tpm.EKDigestOf(h.EK); got != node.EK {
		return Registration{}, nil, refuse(CheckEK, hintRegister, "node %.64q is registered with another endorsement key than %s", h.Node, got)
	}
	if v.EKCertificate == nil {
		return node, v.Keys[i], nil
	}
	if err := v.EKCertificate(h.EKCertificate, h.EK); err != nil {
		return Registration{}, nil, refuse(CheckEKCertificate, "see ekCertificates.folder in the verifier's configuration", "%w", err)
	}
	return node, v.Keys[i], nil
}

// checkAK demands exactly the template, and returns the Name. With it, the Name
// says all that creation data could: the TPM that has the private part made it.
func checkAK(public []byte) ([]byte, error) {
	p, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(tpm2.Marshal(p), public) || !tpm.IsAK(p) {
		return nil, errors.New("it is no restricted signing key as kleidi makes it")
	}
	return nameOf(p)
}

// Prove demands that the answer is of the TPM with the registered endorsement key,
// that this TPM holds the attestation key, and that both saw the same exchange:
// only then is the secret known and the transcript the same.
func (p *Pending) Prove(answer []byte) error {
	if p.spent {
		return refuse(CheckProof, hintForged, "the challenge was answered before")
	}
	p.spent = true
	if !hmac.Equal(proof(p.secret, p.digest), answer) {
		return refuse(CheckProof, hintForged, "the attestation key is not on the TPM with that endorsement key, or somebody stands in between")
	}
	p.proven = true
	return nil
}

// EK returns the digest of the endorsement key that is registered for the node.
func (p *Pending) EK() string { return p.node.EK }

// Passed is an exchange in which everything verified.
type Passed struct {
	pending *Pending
	// Result is what the evidence says.
	Result *attest.Result
}

// Judge demands, in this order: the proof was verified; the quote is fresh (its
// extraData is the transcript), by that attestation key and over exactly the PCRs
// of the boot policy, and the logs lead to it (see [attest.Verify]); the
// attestation key hangs from the claimed storage root key, a primary key of the
// owner hierarchy; the boot policy accepts the boot.
func (p *Pending) Judge(e *Evidence) (*Passed, error) {
	if !p.proven {
		return nil, refuse(CheckProof, hintForged, "the challenge was not answered")
	}
	p.proven = false // no second try
	if err := e.check(); err != nil {
		return nil, refuse(CheckMessage, hintForged, "%w", err)
	}
	policy := p.node.BootPolicy
	evidence := &attest.Evidence{FirmwareLog: e.FirmwareLog, UserspaceLog: e.UserspaceLog,
		Quote: tpm.Quote{AKPublic: p.hello.AK, Attest: e.Attest, Signature: e.Signature, Bank: policy.Hash(), PCRs: e.PCRs}}
	result, err := attest.Verify(evidence, p.digest, policy.Hash(), policy.Demanded())
	if err != nil {
		return nil, refuse(CheckEvidence, attest.RemedyOf(err).Hint("the node's boot policy"), "%w", err)
	}
	if err := p.checkSRK(e.Attest); err != nil {
		return nil, refuse(CheckSRK, hintForged, "%w", err)
	}
	if err := bootpolicy.Judge(policy, result.Log, eventlog.PCRs(result.PCRs)).Err(); err != nil {
		return nil, refuse(CheckBootPolicy, "the boot policy to edit is the one on the verifier's machine", "%w", err)
	}
	return &Passed{pending: p, Result: result}, nil
}

// checkSRK reads the quote's qualifiedSigner, which names every ancestor of the
// attestation key. The quote has verified.
func (p *Pending) checkSRK(quote []byte) error {
	a, err := tpm2.Unmarshal[tpm2.TPMSAttest](quote)
	if err != nil {
		return err
	}
	if !bytes.Equal(a.QualifiedSigner.Buffer, qualifiedName(p.hello.SRK, p.akName)) {
		return errors.New("the attestation key does not hang from it in the owner hierarchy")
	}
	return nil
}

// Sign returns the signature for the session, a TPMT_SIGNATURE. What led to it has
// to be on record before it is called.
func (p *Passed) Sign() ([]byte, error) {
	h := p.pending.hello
	hash, err := authpolicy.SignedHash(h.NonceTPM, PolicyRef(p.pending.verifier.Cluster, h.Node))
	if err != nil {
		return nil, err
	}
	return p.pending.key.sign(hash)
}
