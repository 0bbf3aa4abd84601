package authpolicy

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// ErrKey says that the TPM does not accept a public key. Many TPMs implement neither RSA
// keys of 4096 bits nor P-384.
var ErrKey = errors.New("the TPM does not take the public key")

// keyAttributes are the attributes of every signer's key: a key that can be loaded into
// any TPM and that signs any digest.
var keyAttributes = tpm2.TPMAObject{UserWithAuth: true, SignEncrypt: true}

// PublicKey returns a signer's key as a TPM knows it: RSA of 2048, 3072 or 4096
// bits and exponent 65537, which signs by RSASSA-PKCS1-v1_5 with SHA-256, or
// ECDSA P-256 or P-384, with SHA-256 too.
//
// The key's Name is part of the sealed object's authorization policy, so the public area is
// frozen: with another attribute or scheme for the same key, existing slots would not open.
func PublicKey(key crypto.PublicKey) (tpm2.TPMTPublic, error) {
	switch key := key.(type) {
	case *rsa.PublicKey:
		return rsaPublic(key)
	case *ecdsa.PublicKey:
		return ecdsaPublic(key)
	}
	return tpm2.TPMTPublic{}, fmt.Errorf("a key of type %T; want RSA or ECDSA", key)
}

func rsaPublic(key *rsa.PublicKey) (tpm2.TPMTPublic, error) {
	if key.N == nil || !slices.Contains([]int{2048, 3072, 4096}, key.N.BitLen()) {
		return tpm2.TPMTPublic{}, errors.New("an RSA key of an unsupported size; want 2048, 3072 or 4096 bits")
	}
	if key.E != 65537 {
		return tpm2.TPMTPublic{}, fmt.Errorf("an RSA key with exponent %d, want 65537", key.E)
	}
	scheme := tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgRSASSA,
		Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256})}
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256, ObjectAttributes: keyAttributes,
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{Scheme: scheme, KeyBits: tpm2.TPMKeyBits(key.N.BitLen())}),
		Unique:     tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: key.N.Bytes()}),
	}, nil
}

var curves = map[elliptic.Curve]tpm2.TPMECCCurve{
	elliptic.P256(): tpm2.TPMECCNistP256,
	elliptic.P384(): tpm2.TPMECCNistP384,
}

func ecdsaPublic(key *ecdsa.PublicKey) (tpm2.TPMTPublic, error) {
	curve, ok := curves[key.Curve]
	if !ok {
		return tpm2.TPMTPublic{}, errors.New("an ECDSA key of an unsupported curve; want P-256 or P-384")
	}
	point, err := key.Bytes() // 4, x, y; it fails if that is not a point on the curve
	if err != nil {
		return tpm2.TPMTPublic{}, fmt.Errorf("an ECDSA key: %w", err)
	}
	x, y := point[1:1+len(point)/2], point[1+len(point)/2:]
	scheme := tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA,
		Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})}
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256, ObjectAttributes: keyAttributes,
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{Scheme: scheme, CurveID: curve}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: x}, Y: tpm2.TPM2BECCParameter{Buffer: y}}),
	}, nil
}

// Name returns a public area's Name, by which a TPM identifies a key: 34 bytes. It refuses a
// public area whose Name algorithm is not SHA-256.
func Name(public tpm2.TPMTPublic) ([]byte, error) {
	if public.NameAlg != tpm2.TPMAlgSHA256 {
		return nil, errors.New("a public key whose Name is not by SHA-256")
	}
	name, err := tpm2.ObjectName(&public)
	if err != nil {
		return nil, err
	}
	return name.Buffer, nil
}

// Signature converts a signature by a key that [PublicKey] accepts into the TPM's form. raw
// is the output of crypto.Signer for a SHA-256 hash: an RSASSA-PKCS1-v1_5 signature, or the
// ASN.1 of an ECDSA signature. Signature does not verify it.
func Signature(key crypto.PublicKey, raw []byte) (tpm2.TPMTSignature, error) {
	switch key := key.(type) {
	case *rsa.PublicKey:
		if len(raw) != key.Size() {
			return tpm2.TPMTSignature{}, fmt.Errorf("an RSA signature of %d bytes, want %d", len(raw), key.Size())
		}
		return tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgRSASSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSASSA,
			&tpm2.TPMSSignatureRSA{Hash: tpm2.TPMAlgSHA256, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: raw}})}, nil
	case *ecdsa.PublicKey:
		return ecdsaSignature(key, raw)
	}
	return tpm2.TPMTSignature{}, fmt.Errorf("a key of type %T; want RSA or ECDSA", key)
}

func ecdsaSignature(key *ecdsa.PublicKey, raw []byte) (tpm2.TPMTSignature, error) {
	var s struct{ R, S *big.Int }
	rest, err := asn1.Unmarshal(raw, &s)
	if err != nil || len(rest) > 0 {
		return tpm2.TPMTSignature{}, errors.New("an ECDSA signature that is not the ASN.1 of two integers")
	}
	n := key.Params().N
	size := (n.BitLen() + 7) / 8
	for _, i := range []*big.Int{s.R, s.S} {
		if i.Sign() <= 0 || i.Cmp(n) >= 0 {
			return tpm2.TPMTSignature{}, errors.New("an ECDSA signature out of its curve's range")
		}
	}
	return tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
		Hash:       tpm2.TPMAlgSHA256,
		SignatureR: tpm2.TPM2BECCParameter{Buffer: s.R.FillBytes(make([]byte, size))},
		SignatureS: tpm2.TPM2BECCParameter{Buffer: s.S.FillBytes(make([]byte, size))},
	})}, nil
}

// checkSignature refuses a signature that [Signature] did not make. A missing one
// would otherwise be noticed only when it is marshalled.
func checkSignature(s tpm2.TPMTSignature) (err error) {
	switch s.SigAlg {
	case tpm2.TPMAlgRSASSA:
		_, err = s.Signature.RSASSA()
	case tpm2.TPMAlgECDSA:
		_, err = s.Signature.ECDSA()
	default:
		err = errors.New("neither RSASSA nor ECDSA")
	}
	if err != nil {
		return fmt.Errorf("no signature of a known kind: %w", err)
	}
	return nil
}

// withKey runs f with a public key loaded, and flushes the key afterwards. It needs no more
// than one slot for a transient object, because many TPMs have three.
func withKey(t transport.TPM, public tpm2.TPMTPublic, f func(tpm2.NamedHandle) error) error {
	name, err := Name(public)
	if err != nil {
		return err
	}
	// In the null hierarchy, TPM2_VerifySignature gives an empty ticket.
	r, err := tpm2.LoadExternal{InPublic: tpm2.New2B(public), Hierarchy: tpm2.TPMRHOwner}.Execute(t)
	if isAny(err, notTaken) {
		return fmt.Errorf("TPM2_LoadExternal: %w: %w", ErrKey, err)
	}
	if err != nil {
		return fmt.Errorf("TPM2_LoadExternal: %w", err)
	}
	// If this fails, the next operation frees the handle.
	defer func() { _, _ = tpm2.FlushContext{FlushHandle: r.ObjectHandle}.Execute(t) }()
	return f(tpm2.NamedHandle{Handle: r.ObjectHandle, Name: tpm2.TPM2BName{Buffer: name}})
}

// notTaken are the response codes of TPM2_LoadExternal that blame the key (TPM
// 2.0 Library, Part 3, 12.3).
var notTaken = []tpm2.TPMRC{
	tpm2.TPMRCValue, tpm2.TPMRCCurve, tpm2.TPMRCKeySize, tpm2.TPMRCKey, tpm2.TPMRCECCPoint, tpm2.TPMRCSize,
	tpm2.TPMRCAsymmetric, tpm2.TPMRCHash, tpm2.TPMRCScheme, tpm2.TPMRCType, tpm2.TPMRCRange,
}

// badSignature are the response codes of TPM2_VerifySignature and
// TPM2_PolicySigned that blame the signature (Part 3, 20.1 and 23.3).
var badSignature = []tpm2.TPMRC{tpm2.TPMRCSignature, tpm2.TPMRCScheme, tpm2.TPMRCSize, tpm2.TPMRCHash, tpm2.TPMRCValue, tpm2.TPMRCSelector}

func signatureError(command string, err error) error {
	if isAny(err, badSignature) {
		return fmt.Errorf("%s: %w: %w", command, ErrSignature, err)
	}
	return fmt.Errorf("%s: %w", command, err)
}

func isAny(err error, codes []tpm2.TPMRC) bool {
	return slices.ContainsFunc(codes, func(rc tpm2.TPMRC) bool { return errors.Is(err, rc) })
}

// ErrSignature says that a signature does not verify under the demanded key.
var ErrSignature = errors.New("the signature does not verify")
