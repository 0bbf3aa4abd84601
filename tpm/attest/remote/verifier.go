package remote

import (
	"bytes"
	"slices"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Verifier decides for the nodes of one cluster. It keeps nothing between
// exchanges and may be used concurrently.
type Verifier struct {
	Cluster seal.ClusterID
	// Keys are the signing keys. A node says which of them its slot demands: there is
	// more than one key while nodes move from one key to the next.
	Keys  []*Key
	Nodes map[string]Registration // by node name
	// EKCertificate verifies the certificate of an endorsement key, both DER; nil means
	// that no certificate is demanded. The registered digest identifies the TPM; the
	// certificate is additional evidence that a manufacturer made it.
	EKCertificate func(certificate, spki []byte) error
}

// Registration is an operator's entry for a node.
type Registration struct {
	EK         string // as keys.EKDigest returns it
	BootPolicy *bootpolicy.BootPolicy
}

// The checks, in their order.
const (
	CheckMessage             = exchange.CheckMessage
	CheckCluster             = exchange.CheckCluster
	CheckNode                = exchange.CheckNode
	CheckKey           Check = "signing key"
	CheckEK                  = exchange.CheckEK
	CheckEKCertificate       = exchange.CheckEKCertificate
	CheckAK                  = exchange.CheckAK
	CheckProof               = exchange.CheckProof
	CheckEvidence            = exchange.CheckEvidence
	CheckSRK                 = exchange.CheckSRK
	CheckBootPolicy          = exchange.CheckBootPolicy
)

// Checks returns all checks, in their order.
func Checks() []Check {
	return []Check{CheckMessage, CheckCluster, CheckNode, CheckKey, CheckEK, CheckEKCertificate, CheckAK, CheckProof, CheckEvidence, CheckSRK, CheckBootPolicy}
}

const hintRegister = "compare it with nodes in the verifier's configuration; kleidi status on the node shows its name and EK"

// Pending is an exchange after its challenge. It can be answered once.
type Pending struct {
	*exchange.Pending
	verifier *Verifier
	node     Registration
	key      *Key
	hello    *Hello
}

// Challenge begins an exchange on a TLS connection with that exporter value. It
// demands, in this order: the claims have possible sizes; the cluster is this
// verifier's; the node is registered; the verifier has the key that the slot demands;
// the endorsement key is the registered one, and its certificate verifies if one is
// demanded; the attestation key has kleidi's template (restricted: the key signs
// nothing but statements of its TPM). The challenge then commits to the Name of that
// attestation key.
func (v *Verifier) Challenge(h *Hello, exporter []byte) (*Pending, *Challenge, error) {
	node, key, err := v.identify(h)
	if err != nil {
		return nil, nil, err
	}
	pending, c, err := purpose.Begin(h.claims(), exporter, node.BootPolicy.Hash(), node.BootPolicy.Demanded())
	if err != nil {
		return nil, nil, err
	}
	return &Pending{pending, v, node, key, h}, c, nil
}

// identify returns the registration of the node that h claims to be, and the key that h
// asks for.
func (v *Verifier) identify(h *Hello) (Registration, *Key, error) {
	if err := h.check(); err != nil {
		return Registration{}, nil, exchange.Refuse(CheckMessage, exchange.HintForged, "%w", err)
	}
	if !bytes.Equal(h.Cluster, v.Cluster[:]) {
		return Registration{}, nil, exchange.Refuse(CheckCluster, "see clusterID in the verifier's configuration; kleidi status on the node shows its own", "the node is of cluster %x", h.Cluster)
	}
	node, ok := v.Nodes[h.Node]
	if !ok {
		return Registration{}, nil, exchange.Refuse(CheckNode, hintRegister, "node %.64q is not registered", h.Node)
	}
	i := slices.IndexFunc(v.Keys, func(k *Key) bool { return bytes.Equal(k.name, h.Key) })
	if i < 0 {
		return Registration{}, nil, exchange.Refuse(CheckKey, "see signingKey and formerSigningKeys in the verifier's configuration, and tpm.verifier.publicKey in the node's",
			"the slot demands a signature by another key than this verifier has")
	}
	if got := keys.EKDigestOf(h.EK); got != node.EK {
		return Registration{}, nil, exchange.Refuse(CheckEK, hintRegister, "node %.64q is registered with another endorsement key than %s", h.Node, got)
	}
	if v.EKCertificate == nil {
		return node, v.Keys[i], nil
	}
	if err := v.EKCertificate(h.EKCertificate, h.EK); err != nil {
		return Registration{}, nil, exchange.Refuse(CheckEKCertificate, "see ekCertificates.folder in the verifier's configuration", "%w", err)
	}
	return node, v.Keys[i], nil
}

// EK returns the digest of the endorsement key that is registered for the node.
func (p *Pending) EK() string { return p.node.EK }

// Passed is an exchange in which everything verified.
type Passed struct {
	pending *Pending
	// Result is the result of the verified evidence.
	Result *attest.Result
}

// Judge demands everything that [exchange.Pending.Judge] does, over exactly the PCRs of the
// node's boot policy.
func (p *Pending) Judge(e *Evidence) (*Passed, error) {
	result, err := p.Pending.Judge(e, p.node.BootPolicy)
	if err != nil {
		return nil, err
	}
	return &Passed{pending: p, Result: result}, nil
}

// Sign returns the signature for the session, a TPMT_SIGNATURE. The caller must have
// recorded the verdict before it calls Sign.
func (p *Passed) Sign() ([]byte, error) {
	h := p.pending.hello
	hash, err := authpolicy.SignedHash(h.NonceTPM, PolicyRef(p.pending.verifier.Cluster, h.Node))
	if err != nil {
		return nil, err
	}
	return p.pending.key.sign(hash)
}
