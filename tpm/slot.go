package tpm

import (
	"bytes"
	"crypto"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/google/go-tpm/tpm2"
	kjson "sigs.k8s.io/json"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
)

// formSealed is a slot that was made on the TPM that opens it (fixedTPM,
// fixedParent), in format version 1.
const formSealed = "sealed-v1"

// sealedAttributes are the object attributes of every sealed KEK: it never
// leaves its TPM, no password opens it (userWithAuth clear), and it plays no
// part in the dictionary-attack lockout.
var sealedAttributes = tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true, AdminWithPolicy: true}

// BootState is one way in which a machine booted: exact values of a set of PCRs.
type BootState struct {
	authpolicy.PCR
	// Record is what explains the values to a person (events and digests), a
	// JSON document that this package keeps and does not read.
	Record json.RawMessage
}

// slotData is the JSON in Slot.Data. All of it is untrusted; what it says of its
// authorization policy must hash to the one that the TPM enforces.
type slotData struct {
	Form    string           `json:"form"`
	Made    time.Time        `json:"made"`    // for people: how old the slot is
	SRK     hexBytes         `json:"srk"`     // Name of the storage root key
	EK      string           `json:"ek"`      // digest of the endorsement key, see EKDigest
	Public  []byte           `json:"public"`  // TPMT_PUBLIC
	Private []byte           `json:"private"` // TPM2B_PRIVATE's buffer
	Bank    string           `json:"bank"`
	PCRs    map[int]hexBytes `json:"pcrs"`
	Epoch   slotEpoch        `json:"epoch"`
	Boot    json.RawMessage  `json:"boot,omitempty"`
	public  *tpm2.TPMTPublic // parsed Public
	terms   authpolicy.Terms // from PCRs and Epoch
	state   *BootState       // from Bank, PCRs and Boot
}

type slotEpoch struct {
	Index  uint32 `json:"index"`
	AtMost uint64 `json:"atMost"`
}

type hexBytes []byte

func (h hexBytes) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h)), nil }

func (h *hexBytes) UnmarshalText(b []byte) error {
	*h = make([]byte, hex.DecodedLen(len(b)))
	_, err := hex.Decode(*h, b)
	return err
}

var bankNames = map[string]crypto.Hash{"sha256": crypto.SHA256, "sha384": crypto.SHA384}

// ParseBank reads the setting tpm.bank: sha256 or sha384.
func ParseBank(s string) (crypto.Hash, error) {
	if h, ok := bankNames[s]; ok {
		return h, nil
	}
	return 0, fmt.Errorf("PCR bank %q; want sha256 or sha384", s)
}

func bankName(h crypto.Hash) string {
	for name, hash := range bankNames {
		if hash == h {
			return name
		}
	}
	return h.String()
}

func corrupt(format string, args ...any) error {
	return seal.Errorf(seal.CauseSlotCorrupt, "bring back an undamaged keyring with kleidi keyring restore, or run kleidi recover",
		"the TPM slot is damaged: "+format, args...)
}

// parseSlot reads a slot's data and proves it consistent with itself: the
// authorization policy that its PCR values and epoch come to is the one in the
// object's public area, and the object has the attributes that kleidi gives.
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
	if d.Form != formSealed {
		return nil, corrupt("form %q is not known to this version", clip(d.Form))
	}
	if d.Epoch.Index != counter.Index() {
		return nil, corrupt("it names NV index %#08x for the epoch counter, tpm.epochIndex is %#08x", d.Epoch.Index, counter.Index())
	}
	if err := d.parse(counter); err != nil {
		return nil, corrupt("%w", err)
	}
	return &d, nil
}

func clip(s string) string {
	if len(s) > 40 {
		s = s[:40]
	}
	return strconv.QuoteToASCII(s)
}

// nameSize is the size of a Name by SHA-256: the algorithm, then the digest.
const nameSize = 2 + 32

func (d *slotData) parse(counter Counter) error {
	if len(d.SRK) != nameSize { // none at all would stand for any
		return fmt.Errorf("the Name of its storage root key has %d bytes, want %d", len(d.SRK), nameSize)
	}
	bank, err := ParseBank(d.Bank)
	if err != nil {
		return err
	}
	values := make(map[int][]byte, len(d.PCRs))
	for i, v := range d.PCRs {
		values[i] = v
	}
	d.state = &BootState{PCR: authpolicy.PCR{Bank: bank, Values: values}, Record: d.Boot}
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
	return checkPublic(d.public, digest)
}

// checkPublic refuses a sealed object of another kind than kleidi makes.
func checkPublic(p *tpm2.TPMTPublic, digest []byte) error {
	switch {
	case p.Type != tpm2.TPMAlgKeyedHash || p.NameAlg != tpm2.TPMAlgSHA256:
		return fmt.Errorf("it is no sealed object")
	case p.ObjectAttributes != sealedAttributes:
		return fmt.Errorf("its object attributes are not those of a sealed KEK")
	case !bytes.Equal(p.AuthPolicy.Buffer, digest):
		return fmt.Errorf("its authorization policy is not the one of its PCR values and epoch")
	}
	return nil
}

// terms is the authorization policy of a sealed slot: PolicyPCR, then PolicyNV.
func terms(s *BootState, counter Counter, atMost uint64) authpolicy.Terms {
	return authpolicy.Terms{s.PCR, authpolicy.Epoch{Index: counter.Index(), Name: counter.Name(), AtMost: atMost}}
}

// Demand is what a slot asks of the machine, for display and for the quote.
type Demand struct {
	State  BootState
	AtMost uint64 // the last epoch in which the slot opens
	EK     string
	SRK    []byte // Name of the storage root key
	Made   time.Time
}

// DemandOf reads what a TPM slot asks of the machine. It is as untrusted as the
// slot, but consistent with what the TPM would enforce.
func DemandOf(slot seal.Slot, counter Counter) (Demand, error) {
	d, err := parseSlot(slot, counter)
	if err != nil {
		return Demand{}, err
	}
	return Demand{State: *d.state, AtMost: d.Epoch.AtMost, EK: d.EK, SRK: d.SRK, Made: d.Made}, nil
}
