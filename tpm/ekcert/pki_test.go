package ekcert_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/beezy-dev/kleidi/tpm/ekcert"
)

var (
	start = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	now   = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	end   = time.Date(2040, 1, 1, 0, 0, 0, 0, time.UTC)

	oidEK   = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
	oidAIK  = asn1.ObjectIdentifier{2, 23, 133, 8, 3}
	oidTest = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 55555, 1}
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// eks are endorsement keys of each kind; an RSA key takes a while to make.
var eks = sync.OnceValue(func() map[string]crypto.Signer {
	return map[string]crypto.Signer{
		"RSA-2048": must(rsa.GenerateKey(rand.Reader, 2048)),
		"P-256":    must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)),
		"P-384":    must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)),
	}
})

// ca is a certification authority.
type ca struct {
	cert *x509.Certificate
	der  []byte
	key  crypto.Signer
}

// template is the certificate of a CA, valid from start to end.
func template(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: name}, NotBefore: start, NotAfter: end,
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
}

// issue makes c sign t for a key; without c, the key signs for itself.
func (c *ca) issue(t *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) []byte {
	parent, signer := t, key
	if c != nil {
		parent, signer = c.cert, c.key
	}
	return must(x509.CreateCertificate(rand.Reader, t, parent, pub, signer))
}

// newCA makes a CA, whose certificate change may alter first.
func (c *ca) newCA(name string, change ...func(*x509.Certificate)) *ca {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	t := template(name)
	for _, f := range change {
		f(t)
	}
	der := c.issue(t, key.Public(), key)
	return &ca{cert: must(x509.ParseCertificate(der)), der: der, key: key}
}

// san is a TPM maker's alternative name: a directory name with the maker's ID.
var san = pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: func() []byte {
	name := must(asn1.Marshal(pkix.Name{ExtraNames: []pkix.AttributeTypeAndValue{{Type: asn1.ObjectIdentifier{2, 23, 133, 2, 1}, Value: "id:54455354"}}}.ToRDNSequence()))
	general := must(asn1.Marshal(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: name}))
	return must(asn1.Marshal(asn1.RawValue{Class: asn1.ClassUniversal, Tag: asn1.TagSequence, IsCompound: true, Bytes: general}))
}()}

// ekTemplate is what the EK Credential Profile asks for.
func ekTemplate(ek crypto.PublicKey) *x509.Certificate {
	t := template("")
	t.Subject, t.IsCA, t.KeyUsage = pkix.Name{}, false, x509.KeyUsageKeyAgreement
	if _, ok := ek.(*rsa.PublicKey); ok {
		t.KeyUsage = x509.KeyUsageKeyEncipherment
	}
	t.UnknownExtKeyUsage = []asn1.ObjectIdentifier{oidEK}
	t.ExtraExtensions = []pkix.Extension{san}
	return t
}

// ekCert makes the certificate of an EK, whose template change may alter first.
func (c *ca) ekCert(ek crypto.PublicKey, change ...func(*x509.Certificate)) []byte {
	t := ekTemplate(ek)
	for _, f := range change {
		f(t)
	}
	return c.issue(t, ek, c.key)
}

// forge alters what c signed, and signs it again.
func (c *ca) forge(der []byte, alter func(tbs []byte) []byte) []byte {
	var cert struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}
	must(asn1.Unmarshal(der, &cert))
	tbs := alter(bytes.Clone(cert.TBS.FullBytes))
	sum := sha256.Sum256(tbs)
	sig := must(c.key.Sign(rand.Reader, sum[:], crypto.SHA256))
	cert.TBS = asn1.RawValue{FullBytes: tbs}
	cert.Signature = asn1.BitString{Bytes: sig, BitLength: 8 * len(sig)}
	return must(asn1.Marshal(cert))
}

// negative makes the serial number 7 negative.
func negative(tbs []byte) []byte {
	return bytes.Replace(tbs, []byte{0xa0, 3, 2, 1, 2, 2, 1, 7}, []byte{0xa0, 3, 2, 1, 2, 2, 1, 0x87}, 1)
}

// version2 sets version 2, which allows no extensions.
func version2(tbs []byte) []byte {
	return bytes.Replace(tbs, []byte{0xa0, 3, 2, 1, 2}, []byte{0xa0, 3, 2, 1, 1}, 1)
}

// oaep marks an RSA key for RSAES-OAEP, pss for RSASSA-PSS.
func oaep(tbs []byte) []byte { return rsaFor(tbs, 7) }
func pss(tbs []byte) []byte  { return rsaFor(tbs, 10) }

func rsaFor(tbs []byte, purpose byte) []byte {
	oid := []byte{0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1}
	return bytes.Replace(tbs, oid, append(bytes.Clone(oid[:8]), purpose), 1)
}

func asPEM(certs ...[]byte) []byte {
	var b []byte
	for _, c := range certs {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c})...)
	}
	return b
}

// bundle returns a bundle of these CAs.
func bundle(t testing.TB, cas ...*ca) *ekcert.Bundle {
	t.Helper()
	var all [][]byte
	for _, c := range cas {
		all = append(all, c.der)
	}
	return load(t, fstest.MapFS{"cas.pem": {Data: asPEM(all...)}})
}

func load(t testing.TB, fsys fstest.MapFS) *ekcert.Bundle {
	t.Helper()
	b, err := ekcert.LoadBundle(fsys)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
