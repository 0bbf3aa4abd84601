package keys

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/device"
)

// AKTemplate is a restricted ECDSA P-256 signing key: it signs only what the
// TPM itself states.
var AKTemplate = tpm2.TPMTPublic{
	Type:    tpm2.TPMAlgECC,
	NameAlg: tpm2.TPMAlgSHA256,
	ObjectAttributes: tpm2.TPMAObject{
		FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true,
	},
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		Scheme: tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
		CurveID: tpm2.TPMECCNistP256,
	}),
}

// AK is an attestation key, loaded for the duration of a WithAK.
type AK struct {
	Handle tpm2.TPMHandle
	Name   tpm2.TPM2BName
	Public []byte // TPMT_PUBLIC
}

// IsAK reports whether a public area belongs to a key that WithAK makes. It demands the
// same template. Such a key signs nothing but the TPM's own statements, and needs no
// authorization other than the TPM's check of the private part.
func IsAK(public *tpm2.TPMTPublic) bool {
	want := AKTemplate
	want.Unique = public.Unique
	point, err := public.Unique.ECC()
	return err == nil && point != nil && bytes.Equal(tpm2.Marshal(want), tpm2.Marshal(public))
}

// WithAK runs f with a fresh attestation key below the storage root key.
func WithAK(t transport.TPM, srk *SRK, f func(*AK) error) error {
	made, err := createAK(t, srk)
	if err != nil {
		return err
	}
	return made.with(t, srk, f)
}

// AKStore keeps an attestation key. Nothing in it is secret: the TPM encrypted the
// private part for itself.
type AKStore interface {
	// Load returns the key that was saved last, or nil.
	Load() []byte
	// Save need not succeed: the next quote then makes another key.
	Save([]byte)
}

// withKeptAK runs f with the attestation key that is kept below this storage root key.
// If there is none, or if the TPM does not load it, it makes and keeps a new one.
//
// A kept key proves as much as a fresh one, whoever wrote the file. Only the TPM has
// the private part: the template's fixedTPM and sensitiveDataOrigin ensure that,
// together with the TPM's integrity check of every object that it loads. The session's
// HMAC over the response proves that the TPM loaded the key, as it proved before that
// the TPM made it. The key signs only the TPM's own statements, and the verifier's
// nonce tells a fresh statement from an old one.
func withKeptAK(t transport.TPM, srk *SRK, keep AKStore, f func(*AK) error) error {
	if keep == nil {
		return WithAK(t, srk, f)
	}
	if kept := parseAK(keep.Load(), srk); kept != nil {
		if err := kept.with(t, srk, f); !device.IsTPMError(err) {
			return err
		}
	}
	made, err := createAK(t, srk)
	if err != nil {
		return err
	}
	if err := made.with(t, srk, f); err != nil {
		return err
	}
	keep.Save(made.marshal())
	return nil
}

// formAK is the version of a kept attestation key.
const formAK = "attestation-key-v1"

// maxAK bounds a kept attestation key, in bytes; a real one has about 500.
const maxAK = 4 << 10

// keptAK is an attestation key that is not loaded, as JSON in a file.
type keptAK struct {
	Form    string   `json:"form"`
	SRK     HexBytes `json:"srk"`     // Name of the storage root key
	Public  []byte   `json:"public"`  // TPMT_PUBLIC
	Private []byte   `json:"private"` // TPM2B_PRIVATE's buffer
}

func createAK(t transport.TPM, srk *SRK) (*keptAK, error) {
	r, err := tpm2.Create{ParentHandle: srk.Auth(srk.Session()), InPublic: tpm2.New2B(AKTemplate)}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("TPM2_Create of an attestation key: %w", err)
	}
	return &keptAK{Form: formAK, SRK: srk.Name.Buffer, Public: r.OutPublic.Bytes(), Private: r.OutPrivate.Buffer}, nil
}

// parseAK reads a kept attestation key of this storage root key. It returns nil for
// anything else.
func parseAK(b []byte, srk *SRK) *keptAK {
	var k keptAK
	if len(b) > maxAK || json.Unmarshal(b, &k) != nil || k.Form != formAK || !bytes.Equal(k.SRK, srk.Name.Buffer) {
		return nil
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](k.Public)
	if err != nil || !IsAK(public) || !bytes.Equal(tpm2.Marshal(public), k.Public) {
		return nil
	}
	return &k
}

func (k *keptAK) marshal() []byte {
	b, err := json.Marshal(k)
	if err != nil {
		panic(fmt.Sprintf("encode an attestation key: %v", err)) // strings and bytes always encode
	}
	return append(b, '\n')
}

// with runs f with the key loaded.
func (k *keptAK) with(t transport.TPM, srk *SRK, f func(*AK) error) error {
	r, err := tpm2.Load{ParentHandle: srk.Auth(srk.Session()), InPrivate: tpm2.TPM2BPrivate{Buffer: k.Private},
		InPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](k.Public)}.Execute(t)
	if err != nil {
		return fmt.Errorf("TPM2_Load of an attestation key: %w", err)
	}
	defer Flush(t, r.ObjectHandle)
	return f(&AK{Handle: r.ObjectHandle, Name: r.Name, Public: k.Public})
}

func (ak *AK) auth() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: ak.Handle, Name: ak.Name, Auth: tpm2.PasswordAuth(nil)}
}
