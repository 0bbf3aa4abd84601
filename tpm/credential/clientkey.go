package credential

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// MaxClientKey bounds the file of a client key, in bytes.
const MaxClientKey = 4 << 10

// A client key must outlive kernel updates, because a certificate is issued for it.
var clientKeyKind = &boundKind{
	form: "client-key-v1", max: MaxClientKey, name: "client key", command: "vault-key",
	renew: hintClientKey, without: "keep the client key in a file, with vault.auth.keyFile",
}

const hintClientKey = "make a new one with kleidi vault-key --out FILE --csr FILE, and have a certificate issued for it"

// clientKey is the JSON in a client key's file.
type clientKey struct {
	bound
	key *ecdsa.PublicKey // from Public
}

// clientKeyTemplate is an ECDSA P-256 key that is made in its TPM, never leaves it,
// signs SHA-256 digests only under its authorization policy (userWithAuth clear), and
// plays no part in the dictionary-attack lockout.
func clientKeyTemplate(digest []byte) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgECC,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, AdminWithPolicy: true, NoDA: true, SignEncrypt: true,
		},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: digest},
		Parameters: keys.AKTemplate.Parameters,
	}
}

// NewClientKey makes a signing key in the TPM for a client certificate. The key signs
// only while PCR 7 of the bank keeps its present value: after a change of Secure Boot's
// state or keys, make another key. blob is the content of the file to keep, at most
// [MaxClientKey] bytes. Another TPM can't use it, nor can this TPM after TPM2_Clear.
func NewClientKey(ctx context.Context, d *device.Device, owner keys.Owner, bank crypto.Hash) (blob []byte, public crypto.PublicKey, err error) {
	var b bound
	err = d.Do(ctx, func(t transport.TPM) error {
		return keys.WithSRK(t, owner, nil, func(srk *keys.SRK) (err error) {
			var digest []byte
			if b, digest, err = newBound(t, srk, bank, clientKeyKind); err != nil {
				return err
			}
			return b.create(t, tpm2.Create{ParentHandle: srk.Auth(srk.Session()), InPublic: tpm2.New2B(clientKeyTemplate(digest))})
		})
	})
	if err != nil {
		return nil, nil, device.Classify(err)
	}
	if blob, err = marshalBound(b); err != nil {
		return nil, nil, err
	}
	made, err := parseClientKey(blob)
	if err != nil {
		return nil, nil, err
	}
	return blob, made.key, nil
}

// parseClientKey reads the file of a client key. It proves that the file holds a key of
// the kind that NewClientKey makes, bound to the PCR value in the same file.
func parseClientKey(blob []byte) (*clientKey, error) {
	k := &clientKey{}
	digest, err := k.parse(clientKeyKind, blob, k)
	if err != nil {
		return nil, err
	}
	if k.key, err = clientPublic(k.Public, digest); err != nil {
		return nil, clientKeyKind.damaged("%w", err)
	}
	return k, nil
}

// clientPublic returns the public key of a public area, which must match
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

// ClientSigner returns the client key whose file content NewClientKey returned as blob.
// It signs SHA-256 digests, as ASN.1 ECDSA signatures. It loads nothing yet: each
// signature opens the TPM, within ctx. A refusal by the TPM is a [*seal.Error].
func ClientSigner(ctx context.Context, d *device.Device, owner keys.Owner, blob []byte) (crypto.Signer, error) {
	k, err := parseClientKey(blob)
	if err != nil {
		return nil, err
	}
	return &clientSigner{ctx: ctx, device: d, owner: owner, key: k}, nil
}

type clientSigner struct {
	ctx    context.Context // crypto.Signer has no parameter for it
	device *device.Device
	owner  keys.Owner
	key    *clientKey
}

// Public implements crypto.Signer.
func (s *clientSigner) Public() crypto.PublicKey { return s.key.key }

// Sign implements crypto.Signer. The TPM is the source of randomness.
func (s *clientSigner) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) (signature []byte, err error) {
	if opts.HashFunc() != crypto.SHA256 || len(digest) != crypto.SHA256.Size() {
		return nil, fmt.Errorf("the client key signs SHA-256 digests only, not %v", opts.HashFunc())
	}
	err = useBound(s.ctx, s.device, s.owner, &s.key.bound, clientKeyKind, func(t transport.TPM, key tpm2.NamedHandle, session tpm2.Session) (err error) {
		signature, err = sign(t, key, session, digest)
		return err
	})
	switch {
	case errors.Is(err, keys.ErrOtherSRK):
		return nil, seal.Errorf(seal.CauseCredentials, hintClientKey, "the client key was made in another TPM, or this one was cleared since: %w", err)
	case errors.Is(err, authpolicy.ErrBootState):
		return nil, seal.Errorf(seal.CauseCredentials, hintClientKey, "Secure Boot's state or keys have changed since the client key was made, which is bound to PCR 7: %w", err)
	case err != nil:
		return nil, device.Classify(err)
	}
	return signature, nil
}

func sign(t transport.TPM, key tpm2.NamedHandle, session tpm2.Session, digest []byte) ([]byte, error) {
	r, err := tpm2.Sign{
		KeyHandle:  tpm2.AuthHandle{Handle: key.Handle, Name: key.Name, Auth: session},
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
