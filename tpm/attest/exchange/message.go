package exchange

import (
	"crypto"
	"errors"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// Bounds of the fields of a message, in bytes. If neither these nor a constant size
// bounds a field, the parser of the field does.
const (
	// MaxKey bounds a public key, DER or TPMT_PUBLIC.
	MaxKey         = 2 << 10
	maxNode        = 253
	MaxCertificate = 16 << 10
	MaxStatement   = 4 << 10 // of TPMS_ATTEST and TPMT_SIGNATURE
	MaxCredential  = 1 << 10
	// MaxLog bounds each event log.
	MaxLog = eventlog.MaxSize
)

// Claims are an attester's claims about itself, for any purpose.
type Claims struct {
	Cluster       []byte // cluster ID, 16 bytes
	Node          string
	EK            []byte // SubjectPublicKeyInfo of the endorsement key, DER
	EKCertificate []byte // of the endorsement key, DER; none if empty
	AK            []byte // TPMT_PUBLIC of the attestation key
	SRK           []byte // Name of the storage root key
	// Context is the purpose's part of the transcript.
	Context []byte
}

// Check refuses claims with impossible sizes.
func (c *Claims) Check() error {
	return CheckSizes([]Size{
		{"cluster ID", len(c.Cluster), 16, 16}, {"node name", len(c.Node), 1, maxNode}, {"endorsement key", len(c.EK), 1, MaxKey},
		{"certificate", len(c.EKCertificate), 0, MaxCertificate}, {"attestation key", len(c.AK), 1, MaxKey},
		{"storage root key's Name", len(c.SRK), NameSize, NameSize},
	})
}

// Challenge holds the verifier's demands.
type Challenge struct {
	Nonce      []byte
	Credential []byte // TPMS_ID_OBJECT, encrypted, for TPM2_ActivateCredential
	Secret     []byte // the seed of Credential, encrypted to the endorsement key
	Bank       crypto.Hash
	PCRs       []int
}

// Check refuses a malformed challenge.
func (c *Challenge) Check() error {
	if err := CheckSizes([]Size{
		{"nonce", len(c.Nonce), NonceSize, NonceSize}, {"credential", len(c.Credential), 1, MaxCredential},
		{"encrypted secret", len(c.Secret), 1, MaxCredential}, {"list of PCRs", len(c.PCRs), 1, 24},
	}); err != nil {
		return err
	}
	if _, ok := authpolicy.Banks[c.Bank]; !ok {
		return errors.New("it names no PCR bank; want SHA-256 or SHA-384")
	}
	return CheckPCRs(c.PCRs)
}

// CheckPCRs refuses a list of PCRs that is not in its only valid form.
func CheckPCRs(pcrs []int) error {
	if len(pcrs) == 0 || !slices.IsSorted(pcrs) || len(slices.Compact(slices.Clone(pcrs))) != len(pcrs) || pcrs[0] < 0 || pcrs[len(pcrs)-1] > 23 {
		return errors.New("its PCRs are not ascending numbers from 0 to 23")
	}
	return nil
}

// Evidence is the attester's answer. The Proof comes first: until it has verified, the
// verifier need not receive the long logs.
type Evidence struct {
	Proof        []byte         // see Purpose.Answer
	Attest       []byte         // TPMS_ATTEST of the quote
	Signature    []byte         // TPMT_SIGNATURE of it
	PCRs         map[int][]byte // the quoted values
	FirmwareLog  []byte
	UserspaceLog []byte
}

func (e *Evidence) check() error {
	return CheckSizes([]Size{
		{"quote", len(e.Attest), 0, MaxStatement}, {"quote's signature", len(e.Signature), 0, MaxStatement}, {"set of PCR values", len(e.PCRs), 0, 24},
		{"firmware event log", len(e.FirmwareLog), 0, MaxLog}, {"userspace event log", len(e.UserspaceLog), 0, MaxLog},
	})
}

// Size is the size of a field, with its bounds.
type Size struct {
	What         string
	N, Low, High int
}

// CheckSizes refuses the first field whose size is out of bounds.
func CheckSizes(sizes []Size) error {
	for _, s := range sizes {
		if s.N < s.Low || s.N > s.High {
			return fmt.Errorf("the %s has a size of %d, want %d to %d", s.What, s.N, s.Low, s.High)
		}
	}
	return nil
}
