package tpm

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// ekHandle is where a provisioned TPM keeps its RSA-2048 endorsement key (TCG EK
// Credential Profile, 2.2.1.4).
const ekHandle = tpm2.TPMHandle(0x81010001)

// EKDigest returns what a node is known by: "sha256:" and the hexadecimal
// SHA-256 of the SubjectPublicKeyInfo of its endorsement key, RSA-2048 where
// the TPM has it, else ECC P-256. TPM2_Clear does not change it.
func EKDigest(t transport.TPM) (string, error) {
	pub, err := ekPublic(t)
	if err != nil {
		return "", err
	}
	key, err := tpm2.Pub(*pub)
	if err != nil {
		return "", fmt.Errorf("endorsement key: %w", err)
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", fmt.Errorf("endorsement key: %w", err)
	}
	sum := sha256.Sum256(der)
	return "sha256:" + hex.EncodeToString(sum[:]), nil
}

func ekPublic(t transport.TPM) (*tpm2.TPMTPublic, error) {
	if r, err := (tpm2.ReadPublic{ObjectHandle: ekHandle}).Execute(t); err == nil {
		if pub, err := r.OutPublic.Contents(); err == nil && pub.Type == tpm2.TPMAlgRSA && pub.ObjectAttributes == tpm2.RSAEKTemplate.ObjectAttributes {
			return pub, nil
		}
	}
	var err error
	for _, template := range []tpm2.TPMTPublic{tpm2.RSAEKTemplate, tpm2.ECCEKTemplate} {
		var r *tpm2.CreatePrimaryResponse
		r, err = tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(template)}.Execute(t)
		if err != nil {
			continue
		}
		flush(t, r.ObjectHandle)
		return r.OutPublic.Contents()
	}
	return nil, fmt.Errorf("TPM2_CreatePrimary of the endorsement key: %w", err)
}
