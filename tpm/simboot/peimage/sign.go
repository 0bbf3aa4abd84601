package peimage

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"math/big"
	"time"
)

// Signer is a key for signing images, with the certificate that goes into each
// signature.
type Signer struct {
	Key  *rsa.PrivateKey
	Cert *x509.Certificate
}

// NewSigner returns a signer with a self-signed certificate, or with a certificate that
// issuer issued. It generates a key of 2048 bits.
func NewSigner(name string, issuer *Signer) (*Signer, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, err
	}
	return certify(name, serial, key, issuer)
}

// certify returns the key with a certificate, self-signed or issued by issuer.
func certify(name string, serial *big.Int, key *rsa.PrivateKey, issuer *Signer) (*Signer, error) {
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(2044, 1, 1, 0, 0, 0, 0, time.UTC),
		IsCA:         issuer == nil, BasicConstraintsValid: true,
	}
	parent, signing := template, key
	if issuer != nil {
		parent, signing = issuer.Cert, issuer.Key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signing)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &Signer{key, cert}, nil
}

var sha256ID = pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}, Parameters: asn1.NullRawValue}

// Sign returns an image of this package with an Authenticode signature (SHA-256,
// PKCS#1 v1.5), as sbsign makes it.
func (s *Signer) Sign(image []byte) ([]byte, error) {
	digest := sha256.Sum256(Hashed(image))
	statement, err := asn1.Marshal(struct {
		Data   struct{ Type asn1.ObjectIdentifier }
		Digest struct {
			Algorithm pkix.AlgorithmIdentifier
			Value     []byte
		}
	}{
		struct{ Type asn1.ObjectIdentifier }{asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 15}},
		struct {
			Algorithm pkix.AlgorithmIdentifier
			Value     []byte
		}{sha256ID, digest[:]},
	})
	if err != nil {
		return nil, err
	}
	data, err := s.signedData(statement)
	if err != nil {
		return nil, err
	}
	return attach(image, data), nil
}

type attribute struct {
	ID    asn1.ObjectIdentifier
	Value asn1.RawValue `asn1:"set"`
}

// attributes returns the signed attributes as a SET, and in the form in the signature.
func attributes(statement []byte) (set, implicit asn1.RawValue, err error) {
	var inner asn1.RawValue
	if _, err := asn1.Unmarshal(statement, &inner); err != nil {
		return set, implicit, err
	}
	sum := sha256.Sum256(inner.Bytes)
	var body []byte
	for _, a := range []struct {
		id    asn1.ObjectIdentifier
		value any
	}{
		{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}, asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 4}},
		{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}, sum[:]},
	} {
		value, err := asn1.Marshal(a.value)
		if err != nil {
			return set, implicit, err
		}
		one, err := asn1.Marshal(attribute{a.id, asn1.RawValue{Tag: asn1.TagSet, IsCompound: true, Bytes: value}})
		if err != nil {
			return set, implicit, err
		}
		body = append(body, one...)
	}
	return asn1.RawValue{Tag: asn1.TagSet, IsCompound: true, Bytes: body},
		explicit(body), nil
}

// explicit returns the element that holds other elements under the tag [0].
func explicit(content []byte) asn1.RawValue {
	return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: content}
}

// signedData returns the PKCS#7 of a statement.
func (s *Signer) signedData(statement []byte) ([]byte, error) {
	set, implicit, err := attributes(statement)
	if err != nil {
		return nil, err
	}
	signed, err := asn1.Marshal(set)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(signed)
	signature, err := rsa.SignPKCS1v15(nil, s.Key, crypto.SHA256, sum[:])
	if err != nil {
		return nil, err
	}
	type content struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue
	}
	type signer struct {
		Version int
		Cert    struct {
			Issuer asn1.RawValue
			Serial *big.Int
		}
		Digest     pkix.AlgorithmIdentifier
		Attributes asn1.RawValue
		Algorithm  pkix.AlgorithmIdentifier
		Signature  []byte
	}
	info := signer{Version: 1, Digest: sha256ID, Attributes: implicit, Signature: signature,
		Algorithm: pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}, Parameters: asn1.NullRawValue}}
	info.Cert.Issuer, info.Cert.Serial = asn1.RawValue{FullBytes: s.Cert.RawIssuer}, s.Cert.SerialNumber
	data, err := asn1.Marshal(struct {
		Version      int
		Digests      []pkix.AlgorithmIdentifier `asn1:"set"`
		Content      content
		Certificates asn1.RawValue
		Signers      []signer `asn1:"set"`
	}{
		1, []pkix.AlgorithmIdentifier{sha256ID},
		content{asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 4}, explicit(statement)},
		explicit(s.Cert.Raw),
		[]signer{info},
	})
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(content{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}, explicit(data)})
}

// attach adds a certificate table with one more signature.
func attach(image, signature []byte) []byte {
	le := binary.LittleEndian
	b := append([]byte(nil), image...)
	at, size := le.Uint32(b[security:]), le.Uint32(b[security+4:])
	if at == 0 {
		b = append(b, make([]byte, -len(b)&7)...)
		at = uint32(len(b))
	}
	entry := le.AppendUint32(nil, uint32(8+len(signature)))
	entry = append(entry, 0x00, 0x02, 0x02, 0x00)
	entry = append(entry, signature...)
	entry = append(entry, make([]byte, -len(entry)&7)...)
	b = append(b, entry...)
	le.PutUint32(b[security:], at)
	le.PutUint32(b[security+4:], size+uint32(len(entry)))
	return b
}
