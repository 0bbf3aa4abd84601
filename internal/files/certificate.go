package files

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

// CertificateFor pairs a key with PEM certificates, the first of which must be its own.
func CertificateFor(signer crypto.Signer, b []byte) (*tls.Certificate, error) {
	if len(b) > MaxCertificates {
		return nil, fmt.Errorf("more than %d bytes", MaxCertificates)
	}
	c := &tls.Certificate{PrivateKey: signer, SupportedSignatureAlgorithms: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}}
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			c.Certificate = append(c.Certificate, block.Bytes)
		}
	}
	if len(c.Certificate) == 0 {
		return nil, errors.New("no PEM certificate in it")
	}
	leaf, err := x509.ParseCertificate(c.Certificate[0])
	if err != nil {
		return nil, err
	}
	key, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !key.Equal(signer.Public()) {
		return nil, errors.New("its first certificate is for another key")
	}
	c.Leaf = leaf
	return c, nil
}

// MaxCertificates bounds the file of a client certificate and its chain, in bytes.
const MaxCertificates = 1 << 20
