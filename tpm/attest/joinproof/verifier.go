package joinproof

import (
	"bytes"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootrule"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// Approval is an operator's permission for a named node with a given endorsement key to
// join, with the demands on that node.
type Approval struct {
	EK         string // as keys.EKDigest returns it
	BootPolicy *bootpolicy.BootPolicy
	// Phase is the phase of the boot in which slots are made, if systemd measures
	// phases; "" accepts any phase.
	Phase string
	// AnySigned accepts PCRs that allow every boot that Secure Boot's keys allow.
	AnySigned bool
	// Verifier is the remote verifier that the node's slots must demand; nil means
	// none.
	Verifier *tpm.Verifier
	// Signers may sign boot states of the node.
	Signers []tpm.Signer
}

// The checks of a join, in addition to the checks of every exchange.
const (
	CheckFormat   exchange.Check = "keyring format"
	CheckVerifier exchange.Check = "remote verifier"
	CheckSigner   exchange.Check = "signer of boot states"
	CheckPCRs     exchange.Check = "PCRs to seal to"
	CheckPhase    exchange.Check = "phase of the boot"
)

// Checks returns all checks, in their order.
func Checks() []exchange.Check {
	return []exchange.Check{exchange.CheckMessage, exchange.CheckCluster, exchange.CheckNode, exchange.CheckEK, exchange.CheckEKCertificate, CheckFormat, CheckVerifier, CheckSigner,
		CheckPCRs, exchange.CheckSRK, exchange.CheckAK, exchange.CheckProof, exchange.CheckEvidence, exchange.CheckBootPolicy, CheckPhase}
}

// Verifier decides for the cluster of the node that it runs on. It keeps nothing between
// exchanges and may be used concurrently.
type Verifier struct {
	Cluster seal.ClusterID
	// Format is the format of the present keyring.
	Format int
	// Approval returns the approval for a node, or nil.
	Approval func(node string) *Approval
	// EKCertificate verifies the certificate of an endorsement key, both DER; nil means
	// that no certificate is demanded.
	EKCertificate func(certificate, spki []byte) error
}

// Pending is an exchange after its challenge. It can be answered once.
type Pending struct {
	*exchange.Pending
	approval *Approval
	proven   *Proven
	terms    *Terms
}

// Proven is a node that has proven everything demanded of it.
type Proven struct {
	// Peer is for [tpm.WrapFor], with the state and the epoch.
	Peer  tpm.Peer
	State tpm.BootState
	Epoch uint64
	// Result is the result of the verified evidence.
	Result *attest.Result
}

const (
	hintApprove = "approve that node and that endorsement key with kleidi node approve; kleidi node identity on the new node shows both"
	hintSame    = "configure the new node as this one is, then run kleidi join again"
)

// Challenge begins a join on a TLS connection with that exporter value. It demands, in
// this order: the claims have possible sizes and a valid form; the cluster is this
// verifier's; the node is approved; the endorsement key is the approved one, and its
// certificate verifies if one is demanded; the node reads the format of the present
// keyring; the node's slots demand exactly the remote verifier of the approval; the
// approval allows the signer of its boot states; its PCRs can be sealed to, in the bank
// that the boot policy judges; the storage root key has the template; and everything
// that [exchange.Purpose.Begin] demands. The challenge asks for a quote over the PCRs
// of the boot policy and over the PCRs to seal to.
func (v *Verifier) Challenge(h *Hello, exporter []byte) (*Pending, *exchange.Challenge, error) {
	approval, err := v.identify(h)
	if err != nil {
		return nil, nil, err
	}
	proven, err := v.terms(h, approval)
	if err != nil {
		return nil, nil, err
	}
	claims, err := h.claims()
	if err != nil {
		return nil, nil, exchange.Refuse(exchange.CheckSRK, exchange.HintForged, "%w", err)
	}
	pcrs := append(slices.Clone(h.PCRs), approval.BootPolicy.Demanded()...)
	slices.Sort(pcrs)
	pending, c, err := purpose.Begin(claims, exporter, h.Bank, slices.Compact(pcrs))
	if err != nil {
		return nil, nil, err
	}
	return &Pending{Pending: pending, approval: approval, proven: proven, terms: &h.Terms}, c, nil
}

// identify returns the approval for the node that h claims to be.
func (v *Verifier) identify(h *Hello) (*Approval, error) {
	err := h.check()
	if err == nil {
		bare := exchange.Claims{Cluster: h.Cluster, Node: h.Node, EK: h.EK, EKCertificate: h.EKCertificate, AK: h.AK, SRK: make([]byte, exchange.NameSize)}
		err = bare.Check()
	}
	if err != nil {
		return nil, exchange.Refuse(exchange.CheckMessage, exchange.HintForged, "%w", err)
	}
	if !bytes.Equal(h.Cluster, v.Cluster[:]) {
		return nil, exchange.Refuse(exchange.CheckCluster, "run the command that kleidi node approve printed, on the node that it is for", "the node wants to join cluster %x", h.Cluster)
	}
	approval := v.Approval(h.Node)
	if approval == nil {
		return nil, exchange.Refuse(exchange.CheckNode, hintApprove, "node %.64q is not approved", h.Node)
	}
	if got := keys.EKDigestOf(h.EK); got != approval.EK {
		return nil, exchange.Refuse(exchange.CheckEK, hintApprove, "node %.64q is approved with another endorsement key than %s", h.Node, got)
	}
	if v.EKCertificate != nil {
		if err := v.EKCertificate(h.EKCertificate, h.EK); err != nil {
			return nil, exchange.Refuse(exchange.CheckEKCertificate, "see which manufacturers' certificates this node accepts", "%w", err)
		}
	}
	return approval, nil
}

// terms compares the node's terms with the approval. It returns what is known of the
// node once the node has proven the terms.
func (v *Verifier) terms(h *Hello, a *Approval) (*Proven, error) {
	if !slices.Contains(h.Formats, v.Format) {
		return nil, exchange.Refuse(CheckFormat, "install a version of kleidi on the new node that reads it", "the node reads keyrings of format %v, the present one is of format %d", h.Formats, v.Format)
	}
	if !bytes.Equal(h.Verifier, VerifierKey(a.Verifier)) {
		return nil, exchange.Refuse(CheckVerifier, hintSame, "the node's slots would demand another remote verifier than this node's configuration, or none")
	}
	state := tpm.BootState{PCR: authpolicy.PCR{Bank: h.Bank}, Verifier: a.Verifier}
	if len(h.Signer) > 0 {
		i := slices.IndexFunc(a.Signers, func(s tpm.Signer) bool {
			return bytes.Equal(tpm2.Marshal(s.Key), h.Signer) && bytes.Equal(s.Ref, h.Ref)
		})
		if i < 0 {
			return nil, exchange.Refuse(CheckSigner, "have the node join without a signer, and add its signed boot states afterwards with kleidi bootstate add FILE --public-key FILE", "the node's boot states are signed by a key, or for a reference, that nobody approved")
		}
		state.Use, state.Signer = tpm.UseSigned, &a.Signers[i]
	}
	if h.Bank != a.BootPolicy.Hash() {
		return nil, exchange.Refuse(CheckPCRs, "set tpm.bank on the new node to the bank of the boot policy", "the node seals to another PCR bank than its boot policy judges")
	}
	if err := bootrule.Possible(h.PCRs, demandOf(state.Use, a)); err != nil {
		return nil, exchange.Refuse(CheckPCRs, "leave tpm.pcrs out on the new node", "%w", err)
	}
	counter, err := nv.NewCounter(h.EpochIndex, keys.Owner{})
	if err != nil {
		return nil, exchange.Refuse(exchange.CheckMessage, exchange.HintForged, "%w", err)
	}
	return &Proven{State: state, Epoch: h.Epoch, Peer: tpm.Peer{Node: h.Node, EK: a.EK, SRK: h.SRK, Epoch: counter}}, nil
}

// demandOf returns what the PCRs to seal to must hold. In a slot for signed boot states
// they hold Secure Boot, and the signature holds the rest.
func demandOf(use tpm.Use, a *Approval) bootrule.Demand {
	if a.AnySigned || use == tpm.UseSigned {
		return bootrule.SignedBoot
	}
	return bootrule.WholeBoot
}

// Judge demands everything that [exchange.Pending.Judge] does, then that the boot is in
// the phase in which slots are made, and that the PCRs to seal to hold everything that
// decides this boot. Nothing is wrapped for a boot that did not measure what it
// started. The result says what to wrap for.
func (p *Pending) Judge(e *exchange.Evidence) (*Proven, error) {
	result, err := p.Pending.Judge(e, p.approval.BootPolicy)
	if err != nil {
		return nil, err
	}
	if phases := result.Log.Phases(); p.approval.Phase != "" && len(phases) > 0 && phases[len(phases)-1] != p.approval.Phase {
		return nil, exchange.Refuse(CheckPhase, "run kleidi join while the machine is up", "the boot is in phase %q, and slots are made in phase %q", phases[len(phases)-1], p.approval.Phase)
	}
	proven := *p.proven
	if err := bootrule.Check(result.Log, p.terms.PCRs, demandOf(proven.State.Use, p.approval)); err != nil {
		return nil, exchange.Refuse(CheckPCRs, "see docs/boot-states.md for which PCRs a boot needs", "%w", err)
	}
	proven.State.Values = map[int][]byte{}
	for _, i := range p.terms.PCRs {
		proven.State.Values[i] = result.PCRs[i]
	}
	proven.Result = result
	return &proven, nil
}
