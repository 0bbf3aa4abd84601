package vault

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"time"

	"github.com/beezy-dev/kleidi/tpm/credential"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
	"github.com/beezy-dev/kleidi/vault"
)

// tpmAuth logs in with a certificate whose key is in a TPM: no credential is on the
// disk.
func tpmAuth(s *server) vault.Auth {
	s.t.Helper()
	certAuth(s)
	for _, name := range []string{"client.crt", "client.key"} {
		s.removeFile(name)
	}
	device := tpmtest.New(s.t, simboot.Baseline(simboot.UKI)).TPM()
	blob, public, err := credential.NewClientKey(s.t.Context(), device, keys.Owner{}, crypto.SHA256)
	if err != nil {
		s.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "node-1"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, s.ca.certificate, public, s.ca.key)
	if err != nil {
		s.t.Fatal(err)
	}
	return vault.Auth{Method: vault.MethodCert, Role: "kleidi", ClientCertificate: func(ctx context.Context) (*tls.Certificate, error) {
		signer, err := credential.ClientSigner(ctx, device, keys.Owner{}, blob)
		return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: signer, SupportedSignatureAlgorithms: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}}, err
	}}
}
