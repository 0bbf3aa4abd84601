package vault

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"io"
	"math/big"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
	"github.com/beezy-dev/kleidi/vault"
)

// tpmKey is a signing key that never leaves its TPM: a primary key of the owner
// hierarchy, which the TPM derives again at each use, so that nothing is stored.
type tpmKey struct {
	device *tpm.Device
	public *ecdsa.PublicKey
}

var signingKey = tpm2.TPMTPublic{
	Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
	ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, SignEncrypt: true},
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		CurveID: tpm2.TPMECCNistP256,
		Scheme: tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
	}),
}

func newTPMKey(t *testing.T) *tpmKey {
	t.Helper()
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	address, err := tpm.ParseAddress(m.Device())
	if err != nil {
		t.Fatal(err)
	}
	k := &tpmKey{device: tpm.NewDevice(address, 0)}
	err = k.with(t.Context(), func(_ transport.TPM, key *tpm2.CreatePrimaryResponse) error {
		public, err := key.OutPublic.Contents()
		if err != nil {
			return err
		}
		point, err := public.Unique.ECC()
		if err != nil {
			return err
		}
		k.public, err = ecdsa.ParseUncompressedPublicKey(elliptic.P256(), append([]byte{4}, append(padded(point.X.Buffer), padded(point.Y.Buffer)...)...))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func padded(b []byte) []byte { return new(big.Int).SetBytes(b).FillBytes(make([]byte, 32)) }

// with makes the key in the TPM, for f.
func (k *tpmKey) with(ctx context.Context, f func(t transport.TPM, key *tpm2.CreatePrimaryResponse) error) error {
	return k.device.Do(ctx, func(t transport.TPM) error {
		key, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(signingKey)}.Execute(t)
		if err != nil {
			return fmt.Errorf("TPM2_CreatePrimary: %w", err)
		}
		defer tpm2.FlushContext{FlushHandle: key.ObjectHandle}.Execute(t)
		return f(t, key)
	})
}

// Public implements crypto.Signer.
func (k *tpmKey) Public() crypto.PublicKey { return k.public }

// Sign implements crypto.Signer.
func (k *tpmKey) Sign(_ io.Reader, digest []byte, _ crypto.SignerOpts) (signature []byte, err error) {
	err = k.with(context.Background(), func(t transport.TPM, key *tpm2.CreatePrimaryResponse) error {
		signed, err := tpm2.Sign{
			KeyHandle:  tpm2.AuthHandle{Handle: key.ObjectHandle, Name: key.Name, Auth: tpm2.PasswordAuth(nil)},
			Digest:     tpm2.TPM2BDigest{Buffer: digest},
			InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck},
		}.Execute(t)
		if err != nil {
			return fmt.Errorf("TPM2_Sign: %w", err)
		}
		point, err := signed.Signature.Signature.ECDSA()
		if err != nil {
			return err
		}
		signature, err = asn1.Marshal(struct{ R, S *big.Int }{
			new(big.Int).SetBytes(point.SignatureR.Buffer), new(big.Int).SetBytes(point.SignatureS.Buffer)})
		return err
	})
	return signature, err
}

// tpmAuth logs in by a certificate whose key is in a TPM: no credential is on the disk.
func tpmAuth(s *server) vault.Auth {
	s.t.Helper()
	certAuth(s)
	for _, name := range []string{"client.crt", "client.key"} {
		s.removeFile(name)
	}
	key := newTPMKey(s.t)
	template := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "node-1"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, s.ca.certificate, key.Public(), s.ca.key)
	if err != nil {
		s.t.Fatal(err)
	}
	certificate := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key,
		SupportedSignatureAlgorithms: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}}
	return vault.Auth{Method: vault.MethodCert, Role: "kleidi",
		ClientCertificate: func(context.Context) (*tls.Certificate, error) { return certificate, nil }}
}
