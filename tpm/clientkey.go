package tpm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
)

// MaxClientKey bounds the file of a client key, in bytes.
const MaxClientKey = 4 << 10

// formClientKey is the version of a client key's file.
const formClientKey = "client-key-v1"

// clientKeyPCR holds the state and the keys of Secure Boot. A client key demands
// nothing of the kernel: it has to outlive updates, since a certificate is issued
// for it, and what a boot may open is for the slots' authorization policies to say.
const clientKeyPCR = 7

// clientKey is the JSON in a client key's file. Nothing in it is secret, and it is
// of use to this TPM alone.
type clientKey struct {
	Form    string   `json:"form"`
	SRK     hexBytes `json:"srk"` // Name of the storage root key
	Bank    string   `json:"bank"`
	PCR7    hexBytes `json:"pcr7"`
	Public  []byte   `json:"public"`  // TPMT_PUBLIC
	Private []byte   `json:"private"` // TPM2B_PRIVATE's buffer
	terms   authpolicy.Terms
	key     *ecdsa.PublicKey // from Public
}

// clientKeyTemplate is an ECDSA P-256 key that was made in its TPM, never leaves it,
// signs SHA-256 digests under its authorization policy alone (userWithAuth clear),
// and plays no part in the dictionary-attack lockout.
func clientKeyTemplate(digest []byte) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgECC,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, AdminWithPolicy: true, NoDA: true, SignEncrypt: true,
		},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: digest},
		Parameters: akTemplate.Parameters,
	}
}

// NewClientKey makes a signing key in the TPM for a client certificate. It signs
// only while PCR 7 of the bank is what it is now: after a change of Secure Boot's
// state or keys, make another. blob is what to keep in a file, of at most
// [MaxClientKey] bytes; it is of no use to another TPM, or once this one was cleared.
func (d *Device) NewClientKey(ctx context.Context, owner Owner, bank crypto.Hash) (blob []byte, public crypto.PublicKey, err error) {
	var k *clientKey
	err = d.Do(ctx, func(t transport.TPM) error {
		return WithSRK(t, owner, nil, func(srk *SRK) (err error) {
			k, err = newClientKey(t, srk, bank)
			return err
		})
	})
	if err != nil {
		return nil, nil, classify(err)
	}
	if blob, err = k.marshal(); err != nil {
		return nil, nil, err
	}
	made, err := parseClientKey(blob)
	if err != nil {
		return nil, nil, err
	}
	return blob, made.key, nil
}

func newClientKey(t transport.TPM, srk *SRK, bank crypto.Hash) (*clientKey, error) {
	// In an audit session: who answers in the TPM's place must not choose the value
	r, err := tpm2.PCRRead{PCRSelectionIn: authpolicy.Selection(bank, []int{clientKeyPCR})}.Execute(t, srk.Session(tpm2.Audit()))
	if err != nil {
		return nil, fmt.Errorf("TPM2_PCR_Read: %w", err)
	}
	if len(r.PCRValues.Digests) != 1 {
		return nil, fmt.Errorf("TPM2_PCR_Read: the TPM has no %s bank; set tpm.bank", bankName(bank))
	}
	k := &clientKey{Form: formClientKey, SRK: srk.Name.Buffer, Bank: bankName(bank), PCR7: r.PCRValues.Digests[0].Buffer}
	digest, err := k.authorization()
	if err != nil {
		return nil, seal.Errorf(seal.CauseBootState, "keep the client key in a file, with vault.auth.keyFile; see that the firmware measures into the bank that tpm.bank names",
			"no client key can be bound to this boot: %w", err)
	}
	created, err := tpm2.Create{ParentHandle: srk.auth(srk.Session()), InPublic: tpm2.New2B(clientKeyTemplate(digest))}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("TPM2_Create of a client key: %w", err)
	}
	k.Public, k.Private = created.OutPublic.Bytes(), created.OutPrivate.Buffer
	return k, nil
}

// authorization computes the terms from the bank and PCR 7, and their digest.
func (k *clientKey) authorization() ([]byte, error) {
	bank, err := ParseBank(k.Bank)
	if err != nil {
		return nil, err
	}
	k.terms = authpolicy.Terms{authpolicy.PCR{Bank: bank, Values: map[int][]byte{clientKeyPCR: k.PCR7}}}
	return k.terms.Digest()
}

func (k *clientKey) marshal() ([]byte, error) {
	b, err := json.Marshal(k)
	return append(b, '\n'), err
}

const hintClientKey = "make a new one with kleidi vault-key, and have a certificate issued for it"

// damagedClientKey says that the file of a client key can't be used on any TPM.
func damagedClientKey(format string, args ...any) error {
	return seal.Errorf(seal.CauseCredentials, "bring back the file, or "+hintClientKey, "the file of the client key is damaged: "+format, args...)
}

// parseClientKey reads a client key's file, of which there is only one form for each
// key, and proves that it holds a key of the kind that NewClientKey makes, bound to
// the PCR value that stands beside it.
func parseClientKey(blob []byte) (*clientKey, error) {
	if len(blob) > MaxClientKey {
		return nil, damagedClientKey("more than %d bytes", MaxClientKey)
	}
	k := &clientKey{}
	if err := json.Unmarshal(blob, k); err != nil {
		return nil, damagedClientKey("%w", err)
	}
	if k.Form != formClientKey {
		return nil, damagedClientKey("form %s is not known to this version", clip(k.Form))
	}
	if len(k.SRK) != nameSize { // none at all would stand for any
		return nil, damagedClientKey("the Name of its storage root key has %d bytes, want %d", len(k.SRK), nameSize)
	}
	digest, err := k.authorization()
	if err != nil {
		return nil, damagedClientKey("%w", err)
	}
	if k.key, err = clientPublic(k.Public, digest); err != nil {
		return nil, damagedClientKey("%w", err)
	}
	if same, err := k.marshal(); err != nil || !bytes.Equal(same, blob) {
		return nil, damagedClientKey("it is not as kleidi vault-key writes it")
	}
	return k, nil
}

// clientPublic returns the public key of a public area, which must be that of
// clientKeyTemplate.
func clientPublic(area, digest []byte) (*ecdsa.PublicKey, error) {
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](area)
	if err != nil {
		return nil, fmt.Errorf("public area: %w", err)
	}
	want := clientKeyTemplate(digest)
	want.Unique = public.Unique
	if point, err := public.Unique.ECC(); err != nil || point == nil || !bytes.Equal(tpm2.Marshal(want), area) {
		return nil, errors.New("the key is of another kind, or its authorization policy is not that of its PCR 7")
	}
	pub, err := tpm2.Pub(*public)
	if err != nil {
		return nil, fmt.Errorf("public area: %w", err)
	}
	key, ok := pub.(*ecdsa.PublicKey)
	if !ok {
		return nil, errors.New("public area: it is no ECDSA key")
	}
	if _, err := key.ECDH(); err != nil { // is the point on the curve?
		return nil, fmt.Errorf("public area: %w", err)
	}
	return key, nil
}

// ClientSigner is the client key that NewClientKey made blob of. It signs SHA-256
// digests, as ASN.1 ECDSA signatures. Nothing is loaded yet: each signature opens
// the TPM, within ctx. What the TPM refuses is a [*seal.Error].
func (d *Device) ClientSigner(ctx context.Context, owner Owner, blob []byte) (crypto.Signer, error) {
	k, err := parseClientKey(blob)
	if err != nil {
		return nil, err
	}
	return &clientSigner{ctx: ctx, device: d, owner: owner, key: k}, nil
}

type clientSigner struct {
	ctx    context.Context // crypto.Signer has no place for it
	device *Device
	owner  Owner
	key    *clientKey
}

// Public implements crypto.Signer.
func (s *clientSigner) Public() crypto.PublicKey { return s.key.key }

// Sign implements crypto.Signer. The TPM is the source of randomness.
func (s *clientSigner) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) (signature []byte, err error) {
	if opts.HashFunc() != crypto.SHA256 || len(digest) != crypto.SHA256.Size() {
		return nil, fmt.Errorf("the client key signs SHA-256 digests only, not %v", opts.HashFunc())
	}
	err = s.device.Do(s.ctx, func(t transport.TPM) error {
		return WithSRK(t, s.owner, s.key.SRK, func(srk *SRK) (err error) {
			for range unsealTries {
				signature, err = s.key.sign(t, srk, digest)
				if !errors.Is(err, tpm2.TPMRCPCRChanged) {
					break
				}
			}
			return err
		})
	})
	switch {
	case errors.Is(err, errOtherSRK):
		return nil, seal.Errorf(seal.CauseCredentials, hintClientKey, "the client key was made in another TPM, or this one was cleared since: %w", err)
	case errors.Is(err, authpolicy.ErrBootState):
		return nil, seal.Errorf(seal.CauseCredentials, hintClientKey, "Secure Boot's state or keys have changed since the client key was made, which is bound to PCR 7: %w", err)
	case err != nil:
		return nil, classify(err)
	}
	return signature, nil
}

// sign loads the key last: see Wrapper.unsealOnce. The session, salted to the storage
// root key that the file names, proves that the answer is that TPM's.
func (k *clientKey) sign(t transport.TPM, srk *SRK, digest []byte) ([]byte, error) {
	session, done, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, nonceSize, srk.salted())
	if err != nil {
		return nil, fmt.Errorf("TPM2_StartAuthSession: %w", err)
	}
	defer func() { _ = done() }() // a session that the TPM has ended already can't be ended again
	if err := k.terms.Satisfy(t, session); err != nil {
		return nil, err
	}
	loaded, err := tpm2.Load{
		ParentHandle: srk.auth(srk.Session()),
		InPrivate:    tpm2.TPM2BPrivate{Buffer: k.Private},
		InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](k.Public),
	}.Execute(t)
	if err != nil {
		if slices.ContainsFunc(damaged, func(rc tpm2.TPMRC) bool { return errors.Is(err, rc) }) {
			return nil, damagedClientKey("TPM2_Load: %w", err)
		}
		return nil, fmt.Errorf("TPM2_Load of a client key: %w", err)
	}
	defer flush(t, loaded.ObjectHandle)
	r, err := tpm2.Sign{
		KeyHandle:  tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: session},
		Digest:     tpm2.TPM2BDigest{Buffer: digest},
		InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck},
	}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("TPM2_Sign: %w", err)
	}
	point, err := r.Signature.Signature.ECDSA()
	if err != nil {
		return nil, fmt.Errorf("TPM2_Sign: %w", err)
	}
	return asn1.Marshal(struct{ R, S *big.Int }{
		new(big.Int).SetBytes(point.SignatureR.Buffer), new(big.Int).SetBytes(point.SignatureS.Buffer)})
}
