package tpm

import (
	"bytes"
	"crypto"
	"encoding/json"
	"fmt"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	kjson "sigs.k8s.io/json"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Forms of slots that were made on the TPM that opens them (fixedTPM, fixedParent). A
// slot without the members of the later form keeps the first form.
const (
	formSealed   = "sealed-v1" // PolicyPCR, PolicyNV
	formSealedV2 = "sealed-v2" // the same, and the policies for every other Use and for a verifier
)

// Use is the purpose of a slot.
type Use string

// The uses of slots.
const (
	// UsePresent is the boot that was attested when the slot was made.
	UsePresent Use = ""
	// UseNext is a boot that was predicted from the files of the next boot.
	UseNext Use = "next"
	// UseSuspend is any boot with the same values of the PCRs, for a few boots.
	UseSuspend Use = "suspend"
	// UseSigned is any boot with the same values of the PCRs whose other PCRs an
	// operator's key has signed.
	UseSigned Use = "signed"
)

// Signer identifies a key that may sign boot states, and the policyRef that it signs
// for.
type Signer struct {
	Key tpm2.TPMTPublic // made by authpolicy.PublicKey
	Ref []byte          // at most 32 bytes; signed with each boot state
}

// ParseSigner reads a key as Area returns it. [BootState.Check] judges it.
func ParseSigner(area, ref []byte) (Signer, error) {
	return (&slotSigner{Key: area, Ref: ref}).parse()
}

// Area returns the key's public area, a TPMT_PUBLIC.
func (s Signer) Area() []byte { return tpm2.Marshal(s.Key) }

// Public returns the signer's key.
func (s Signer) Public() (crypto.PublicKey, error) { return tpm2.Pub(s.Key) }

// Verifier is a remote verifier that must agree before the TPM unseals, for
// this node of this cluster.
type Verifier struct {
	Signer
	Cluster seal.ClusterID
}

// BootState is one way to boot: exact values of a set of PCRs.
type BootState struct {
	authpolicy.PCR
	Use Use
	// Signer signs the other PCRs; only for UseSigned.
	Signer *Signer
	// Resets is the TPM's last resetCount at which the slot opens; only for UseSuspend.
	Resets uint32
	// Verifier must agree to each opening; nil means no verifier.
	Verifier *Verifier
	// Record explains the values to a person (events and digests). It is a JSON
	// document that this package keeps and does not read.
	Record json.RawMessage
}

// slotData is the JSON in Slot.Data. All of it is untrusted, but the terms in it must
// hash to the authorization policy that the TPM enforces.
type slotData struct {
	Form     string                `json:"form"`
	Made     time.Time             `json:"made"`              // only for display: the age of the slot
	SRK      keys.HexBytes         `json:"srk"`               // Name of the storage root key
	EK       string                `json:"ek"`                // digest of the endorsement key, see keys.EKDigest
	Public   []byte                `json:"public"`            // TPMT_PUBLIC
	Private  []byte                `json:"private"`           // TPM2B_PRIVATE's buffer
	EncSeed  []byte                `json:"encSeed,omitempty"` // with formImport: TPM2B_ENCRYPTED_SECRET's buffer, to the storage root key
	Bank     string                `json:"bank"`
	PCRs     map[int]keys.HexBytes `json:"pcrs"`
	Epoch    slotEpoch             `json:"epoch"`
	Boot     json.RawMessage       `json:"boot,omitempty"`
	Use      Use                   `json:"use,omitempty"`
	Signer   *slotSigner           `json:"signer,omitempty"`
	Resets   *slotResets           `json:"resets,omitempty"`
	Verifier *slotVerifier         `json:"verifier,omitempty"`
	public   *tpm2.TPMTPublic      // parsed Public
	terms    authpolicy.Terms      // from PCRs and Epoch
	state    *BootState            // from Bank, PCRs and Boot
}

func newSlotData(s *BootState) *slotData {
	d := &slotData{Made: time.Now().UTC().Truncate(time.Second), Bank: keys.BankName(s.Bank), PCRs: map[int]keys.HexBytes{}, Use: s.Use, Boot: s.Record, state: s}
	for i, v := range s.Values {
		d.PCRs[i] = v
	}
	if s.Use == UseSuspend {
		d.Resets = &slotResets{AtMost: s.Resets}
	}
	if s.Signer != nil {
		d.Signer = &slotSigner{Key: tpm2.Marshal(s.Signer.Key), Ref: s.Signer.Ref}
	}
	if v := s.Verifier; v != nil {
		d.Verifier = &slotVerifier{slotSigner{Key: tpm2.Marshal(v.Key), Ref: v.Ref}, v.Cluster}
	}
	d.Form = d.form()
	return d
}

type slotEpoch struct {
	Index  uint32 `json:"index"`
	AtMost uint64 `json:"atMost"`
}

type slotSigner struct {
	Key []byte        `json:"key"` // TPMT_PUBLIC
	Ref keys.HexBytes `json:"ref"`
}

func (s *slotSigner) parse() (Signer, error) {
	key, err := tpm2.Unmarshal[tpm2.TPMTPublic](s.Key)
	if err != nil {
		return Signer{}, err
	}
	return Signer{Key: *key, Ref: s.Ref}, nil
}

type slotVerifier struct {
	slotSigner
	Cluster seal.ClusterID `json:"cluster"`
}

type slotResets struct {
	AtMost uint32 `json:"atMost"`
}

func corrupt(format string, args ...any) error {
	return seal.Errorf(seal.CauseSlotCorrupt, "bring back an undamaged keyring with kleidi keyring restore --previous, or kleidi keyring restore BACKUP",
		"the TPM slot is damaged: "+format, args...).OrRecover()
}

// parseSlot reads a slot's data and proves that it is consistent: the authorization
// policy computed from its PCR values and its epoch is the one in the object's public
// area, and the object has the attributes that kleidi sets.
func parseSlot(slot seal.Slot, counter Counter) (*slotData, error) {
	if len(slot.Data) > seal.MaxSlotData {
		return nil, corrupt("%d bytes, at most %d are read", len(slot.Data), seal.MaxSlotData)
	}
	var d slotData
	strict, err := kjson.UnmarshalStrict(slot.Data, &d)
	if err == nil && len(strict) > 0 {
		err = strict[0]
	}
	if err != nil {
		return nil, corrupt("%w", err)
	}
	if d.Form != d.form() {
		return nil, corrupt("form %+.40q is not known to this version, or not that of a slot for %+.40q", d.Form, string(d.Use))
	}
	if d.Epoch.Index != counter.Index() {
		return nil, corrupt("it names NV index %#08x for the epoch counter, tpm.epochIndex is %#08x", d.Epoch.Index, counter.Index())
	}
	if err := d.parse(counter); err != nil {
		return nil, corrupt("%w", err)
	}
	return &d, nil
}

// form returns the form that the slot's members call for, or "" if they fit no form.
func (d *slotData) form() string {
	signed, suspended := d.Signer != nil, d.Resets != nil
	switch {
	case signed != (d.Use == UseSigned) || suspended != (d.Use == UseSuspend):
		return ""
	case d.EncSeed != nil && (d.Use == UsePresent || d.Use == UseNext || signed || suspended):
		return formImport
	case d.EncSeed != nil:
		return ""
	case d.Use == UsePresent && d.Verifier == nil:
		return formSealed
	case d.Use == UsePresent, d.Use == UseNext, signed, suspended:
		return formSealedV2
	}
	return ""
}

func (d *slotData) parse(counter Counter) error {
	if len(d.SRK) != keys.NameSize { // an empty Name would match any key
		return fmt.Errorf("the Name of its storage root key has %d bytes, want %d", len(d.SRK), keys.NameSize)
	}
	bank, err := keys.ParseBank(d.Bank)
	if err != nil {
		return err
	}
	values := make(map[int][]byte, len(d.PCRs))
	for i, v := range d.PCRs {
		values[i] = v
	}
	d.state = &BootState{PCR: authpolicy.PCR{Bank: bank, Values: values}, Use: d.Use, Record: d.Boot}
	if d.Resets != nil {
		d.state.Resets = d.Resets.AtMost
	}
	if d.Signer != nil {
		signer, err := d.Signer.parse()
		if err != nil {
			return fmt.Errorf("the key of its signed boot states: %w", err)
		}
		d.state.Signer = &signer
	}
	if v := d.Verifier; v != nil {
		signer, err := v.parse()
		if err != nil {
			return fmt.Errorf("its verifier's key: %w", err)
		}
		d.state.Verifier = &Verifier{signer, v.Cluster}
	}
	if err := d.state.Check(); err != nil {
		return err
	}
	d.terms = terms(d.state, counter, d.Epoch.AtMost)
	digest, err := d.terms.Digest()
	if err != nil {
		return err
	}
	d.public, err = tpm2.Unmarshal[tpm2.TPMTPublic](d.Public)
	if err != nil {
		return fmt.Errorf("public area: %w", err)
	}
	attributes := keys.SealedAttributes
	if d.EncSeed != nil {
		attributes = importAttributes
	}
	return checkPublic(d.public, attributes, digest)
}

// checkPublic refuses a sealed object of a kind that kleidi does not make.
func checkPublic(p *tpm2.TPMTPublic, attributes tpm2.TPMAObject, digest []byte) error {
	switch {
	case p.Type != tpm2.TPMAlgKeyedHash || p.NameAlg != tpm2.TPMAlgSHA256:
		return fmt.Errorf("it is not a sealed object")
	case p.ObjectAttributes != attributes:
		return fmt.Errorf("its object attributes are not those of a sealed KEK")
	case !bytes.Equal(p.AuthPolicy.Buffer, digest):
		return fmt.Errorf("its authorization policy is not the one of its PCR values and epoch")
	}
	return nil
}

// terms returns the authorization policy of a sealed slot: PolicyAuthorize if others
// may sign, PolicyPCR, PolicyCounterTimer if boots are counted, PolicyNV, and
// PolicySigned if a verifier must agree. The verifier is asked last.
func terms(s *BootState, counter EpochIndex, atMost uint64) authpolicy.Terms {
	var ts authpolicy.Terms
	if s.Signer != nil {
		ts = append(ts, authpolicy.Authorized{Key: s.Signer.Key, Ref: s.Signer.Ref})
	}
	ts = append(ts, s.PCR)
	if s.Use == UseSuspend {
		ts = append(ts, authpolicy.Resets{AtMost: s.Resets})
	}
	ts = append(ts, authpolicy.Epoch{Index: counter.Index(), Name: counter.Name(), AtMost: atMost})
	if s.Verifier != nil {
		ts = append(ts, authpolicy.Signed{Key: s.Verifier.Key, Ref: s.Verifier.Ref})
	}
	return ts
}

// Demand is what a slot demands of the machine, for display and for the quote.
type Demand struct {
	State  BootState
	AtMost uint64 // the last epoch in which the slot opens
	EK     string
	SRK    []byte // Name of the storage root key
	Made   time.Time
}

// DemandOf reads the demands of a TPM slot. The result is as untrusted as the slot, but
// consistent with what the TPM would enforce.
func DemandOf(slot seal.Slot, counter Counter) (Demand, error) {
	d, err := parseSlot(slot, counter)
	if err != nil {
		return Demand{}, err
	}
	return Demand{State: *d.state, AtMost: d.Epoch.AtMost, EK: d.EK, SRK: d.SRK, Made: d.Made}, nil
}

// Counter is the node's epoch counter, see package nv.
type Counter interface {
	Index() uint32
	Name() []byte
	Read(transport.TPM, *keys.SRK) (uint64, error)
	Ensure(transport.TPM, *keys.SRK) (uint64, error)
	RaiseTo(t transport.TPM, srk *keys.SRK, value uint64) error
}

// EpochIndex is the NV index of a node's epoch counter. The code of this process
// computes its Name and never takes it from that node.
type EpochIndex interface {
	Index() uint32
	Name() []byte
}

// formImport is the form of a slot that another node made for this node's TPM, from
// public data alone. Its terms are the same as those of a sealed slot. An attacker who
// records such a slot and breaks ECDH on P-256 later learns the KEK. So a node seals
// the KEK again on its own TPM once it has opened an import slot, and keeps no import
// slot.
const formImport = "import-v1"

// importAttributes are the object attributes of an imported KEK. fixedTPM is clear,
// because the object is made outside the TPM. The object still can't be moved on: TPM2
// never duplicates an object without TPM2_PolicyDuplicationSelect in its authorization
// policy.
var importAttributes = tpm2.TPMAObject{NoDA: true, AdminWithPolicy: true}
