package keys

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

// EK is the endorsement key, usable for the duration of a WithEK.
type EK struct {
	Handle tpm2.TPMHandle
	Name   tpm2.TPM2BName
	Public tpm2.TPMTPublic
	SPKI   []byte // SubjectPublicKeyInfo, DER
}

// EKDigest returns the digest that identifies a node: "sha256:" and the hexadecimal
// SHA-256 of the SubjectPublicKeyInfo of its endorsement key, RSA-2048 if the TPM has
// one, else ECC P-256. TPM2_Clear does not change the digest.
func EKDigest(t transport.TPM) (digest string, err error) {
	err = WithEK(t, func(ek *EK) error {
		digest = EKDigestOf(ek.SPKI)
		return nil
	})
	return digest, err
}

// EKDigestOf returns the digest of an endorsement key's SubjectPublicKeyInfo (DER).
func EKDigestOf(spki []byte) string {
	sum := sha256.Sum256(spki)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// WithEK runs f with the endorsement key: RSA-2048 if the TPM has one, else ECC P-256.
// It uses the persistent key at 0x81010001 if that is an endorsement key. Otherwise it
// makes the key again as a transient primary, which takes seconds, and flushes it.
func WithEK(t transport.TPM, f func(*EK) error) error {
	if r, err := (tpm2.ReadPublic{ObjectHandle: ekHandle}).Execute(t); err == nil {
		pub, err := r.OutPublic.Contents()
		if err == nil && pub.Type == tpm2.TPMAlgRSA && pub.ObjectAttributes == tpm2.RSAEKTemplate.ObjectAttributes {
			return withEK(ekHandle, pub, f)
		}
	}
	var err error
	for _, template := range []tpm2.TPMTPublic{tpm2.RSAEKTemplate, tpm2.ECCEKTemplate} {
		var r *tpm2.CreatePrimaryResponse
		r, err = tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(template)}.Execute(t)
		if err != nil {
			continue
		}
		defer Flush(t, r.ObjectHandle)
		pub, err := r.OutPublic.Contents()
		if err != nil {
			return fmt.Errorf("endorsement key: %w", err)
		}
		return withEK(r.ObjectHandle, pub, f)
	}
	return fmt.Errorf("TPM2_CreatePrimary of the endorsement key: %w", err)
}

func withEK(h tpm2.TPMHandle, pub *tpm2.TPMTPublic, f func(*EK) error) error {
	key, err := tpm2.Pub(*pub)
	if err != nil {
		return fmt.Errorf("endorsement key: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return fmt.Errorf("endorsement key: %w", err)
	}
	name, err := tpm2.ObjectName(pub)
	if err != nil {
		return fmt.Errorf("endorsement key: %w", err)
	}
	return f(&EK{Handle: h, Name: *name, Public: *pub, SPKI: spki})
}

// Activate returns the secret of a credential that was made for this endorsement key
// and the attestation key. TPM2_ActivateCredential answers only while both keys are
// loaded, the attestation key with its private part. The secret crosses the bus
// encrypted, in a session salted to srk.
func (ek *EK) Activate(t transport.TPM, srk *SRK, ak *AK, credential, encrypted []byte) ([]byte, error) {
	session, done, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, NonceSize, srk.Salted(), tpm2.AESEncryption(128, tpm2.EncryptOut))
	if err != nil {
		return nil, fmt.Errorf("TPM2_StartAuthSession: %w", err)
	}
	defer func() { _ = done() }()
	endorsement := tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Name: tpm2.HandleName(tpm2.TPMRHEndorsement), Auth: tpm2.PasswordAuth(nil)}
	if _, err := (tpm2.PolicySecret{AuthHandle: endorsement, PolicySession: session.Handle(), NonceTPM: session.NonceTPM()}).Execute(t); err != nil {
		return nil, fmt.Errorf("TPM2_PolicySecret: %w", err)
	}
	r, err := tpm2.ActivateCredential{
		ActivateHandle: ak.auth(),
		KeyHandle:      tpm2.AuthHandle{Handle: ek.Handle, Name: ek.Name, Auth: session},
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: credential},
		Secret:         tpm2.TPM2BEncryptedSecret{Buffer: encrypted},
	}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("TPM2_ActivateCredential: %w", err)
	}
	return r.CertInfo.Buffer, nil
}

// The NV indices at which a manufacturer stores the certificate of the endorsement key
// (TCG EK Credential Profile, 2.2.1.4 and 2.2.1.5).
const (
	rsaCertificate = tpm2.TPMHandle(0x01c00002)
	eccCertificate = tpm2.TPMHandle(0x01c0000a)
)

const (
	// maxCertificate bounds a certificate in the TPM, in bytes; real ones have
	// 1,000 to 2,000.
	maxCertificate = 8 << 10
	// nvBlock is the size of one TPM2_NV_Read, in bytes; every TPM supports it.
	nvBlock = 512
)

// EKCertificate returns the content of the NV index for the certificate of the
// endorsement key (DER, perhaps padded), or nil if nothing can be read there. It is a
// claim that nothing vouches for yet.
func EKCertificate(t transport.TPM, ek *EK) []byte {
	handle := rsaCertificate
	if ek.Public.Type == tpm2.TPMAlgECC {
		handle = eccCertificate
	}
	r, err := tpm2.NVReadPublic{NVIndex: handle}.Execute(t)
	if err != nil {
		return nil
	}
	public, err := r.NVPublic.Contents()
	if err != nil || public.DataSize > maxCertificate {
		return nil
	}
	index := tpm2.NamedHandle{Handle: handle, Name: r.NVName}
	auth := tpm2.AuthHandle{Handle: handle, Name: r.NVName, Auth: tpm2.PasswordAuth(nil)}
	var b []byte
	for len(b) < int(public.DataSize) {
		n := min(nvBlock, public.DataSize-uint16(len(b)))
		r, err := tpm2.NVRead{AuthHandle: auth, NVIndex: index, Size: n, Offset: uint16(len(b))}.Execute(t)
		if err != nil || len(r.Data.Buffer) != int(n) {
			return nil
		}
		b = append(b, r.Data.Buffer...)
	}
	return b
}
