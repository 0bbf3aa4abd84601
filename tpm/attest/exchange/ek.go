package exchange

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// encapsulationKey returns the TPM key that a claimed endorsement public key stands
// for: one of the TCG's two templates (EK Credential Profile, L-1 and L-2) with that
// public key in it. It takes nothing but the public key from the claim, because only
// the digest of the public key was registered.
func encapsulationKey(spki []byte) (tpm2.LabeledEncapsulationKey, error) {
	key, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, err
	}
	var public tpm2.TPMTPublic
	switch k := key.(type) {
	case *rsa.PublicKey:
		if k.N.BitLen() != 2048 || k.E != 65537 {
			return nil, fmt.Errorf("an RSA key of %d bits with exponent %d; want 2048 and 65537", k.N.BitLen(), k.E)
		}
		// x509 accepts an even modulus, but nothing can be encrypted with it.
		if k.N.Bit(0) == 0 {
			return nil, errors.New("an RSA key with an even modulus")
		}
		public = tpm2.RSAEKTemplate
		public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: k.N.FillBytes(make([]byte, 256))})
	case *ecdsa.PublicKey:
		point, err := k.Bytes()
		if err != nil || len(point) != 1+2*32 {
			return nil, fmt.Errorf("an ECC key on %s; want P-256", k.Curve.Params().Name)
		}
		public = tpm2.ECCEKTemplate
		public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]}})
	default:
		return nil, fmt.Errorf("a key of type %T; want RSA or ECC", key)
	}
	return tpm2.ImportEncapsulationKey(&public)
}

// makeCredential encrypts a secret so that only the TPM with that endorsement key
// reveals it, and only while the key of that Name is loaded in that TPM.
func makeCredential(ek tpm2.LabeledEncapsulationKey, ak, secret []byte) (credential, encrypted []byte, err error) {
	credential, encrypted, err = tpm2.CreateCredential(rand.Reader, ek, ak, secret)
	if err != nil {
		return nil, nil, fmt.Errorf("credential for the endorsement key: %w", err)
	}
	return credential, encrypted, nil
}
