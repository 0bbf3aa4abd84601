package predict

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"math/big"
)

// signer identifies the signer of an image: the certificate of its key, and the other
// certificates in the signature.
type signer struct {
	leaf  *x509.Certificate
	certs []*x509.Certificate
}

// maxCertificates bounds the certificates that are read of one signature.
const maxCertificates = 16

// PKCS#7 (RFC 2315) as Authenticode uses it.
type (
	contentInfo struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue `asn1:"explicit,tag:0"`
	}
	signedData struct {
		Version      int
		Digests      asn1.RawValue
		Content      contentInfo
		Certificates asn1.RawValue `asn1:"optional,tag:0"`
		CRLs         asn1.RawValue `asn1:"optional,tag:1"`
		Signers      []signerInfo  `asn1:"set"`
	}
	signerInfo struct {
		Version int
		Cert    struct {
			Issuer asn1.RawValue
			Serial *big.Int
		}
		Digest     algorithm
		Attributes asn1.RawValue `asn1:"optional,tag:0"`
		Algorithm  algorithm
		Signature  []byte
		Unsigned   asn1.RawValue `asn1:"optional,tag:1"`
	}
	algorithm struct {
		ID         asn1.ObjectIdentifier
		Parameters asn1.RawValue `asn1:"optional"`
	}
	attribute struct {
		ID     asn1.ObjectIdentifier
		Values asn1.RawValue `asn1:"set"`
	}
	indirectData struct { // SpcIndirectDataContent
		Data   asn1.RawValue
		Digest struct {
			Algorithm algorithm
			Value     []byte
		}
	}
)

var (
	oidSignedData    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidIndirectData  = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 4}
	oidMessageDigest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
)

// signatureHashes are the accepted hash algorithms.
var signatureHashes = []struct {
	id   asn1.ObjectIdentifier
	hash crypto.Hash
}{
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}, crypto.SHA256},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}, crypto.SHA384},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 3}, crypto.SHA512},
}

func hashOf(a algorithm) crypto.Hash {
	for _, h := range signatureHashes {
		if h.id.Equal(a.ID) {
			return h.hash
		}
	}
	return 0
}

// errSignature says that a signature does not verify, or has an unknown form.
var errSignature = errors.New("the signature does not verify")

// verify checks one signature of the image, in this order: it is Authenticode with one
// signer; the signed digest is the image's; the attributes hold the digest of that
// statement; the signer's RSA key signed the attributes. The caller decides whether to trust
// the signer. verify ignores dates, as firmware does.
func (img *image) verify(signature []byte) (*signer, error) {
	var outer contentInfo
	var data signedData
	if _, err := asn1.Unmarshal(signature, &outer); err != nil || !outer.Type.Equal(oidSignedData) {
		return nil, errSignature
	}
	if _, err := asn1.Unmarshal(outer.Content.Bytes, &data); err != nil || len(data.Signers) != 1 || !data.Content.Type.Equal(oidIndirectData) {
		return nil, errSignature
	}
	var statement indirectData
	var inner asn1.RawValue
	if _, err := asn1.Unmarshal(data.Content.Content.Bytes, &statement); err != nil {
		return nil, errSignature
	}
	if _, err := asn1.Unmarshal(data.Content.Content.Bytes, &inner); err != nil {
		return nil, errSignature
	}
	h := hashOf(statement.Digest.Algorithm)
	if h == 0 || !bytes.Equal(statement.Digest.Value, img.digest(h)) {
		return nil, errSignature
	}
	s, err := findSigner(data)
	if err != nil {
		return nil, err
	}
	return s, s.check(data.Signers[0], inner.Bytes)
}

// digest returns the image's Authenticode digest.
func (img *image) digest(hash crypto.Hash) []byte {
	h := hash.New()
	for _, p := range img.hashed {
		h.Write(p)
	}
	return h.Sum(nil)
}

func findSigner(data signedData) (*signer, error) {
	s := &signer{}
	rest := data.Certificates.Bytes
	for len(rest) > 0 && len(s.certs) < maxCertificates {
		var raw asn1.RawValue
		var err error
		if rest, err = asn1.Unmarshal(rest, &raw); err != nil {
			return nil, errSignature
		}
		c, err := x509.ParseCertificate(raw.FullBytes)
		if err != nil {
			continue // the certificate belongs to another chain
		}
		s.certs = append(s.certs, c)
		id := data.Signers[0].Cert
		if bytes.Equal(c.RawIssuer, id.Issuer.FullBytes) && c.SerialNumber.Cmp(id.Serial) == 0 {
			s.leaf = c
		}
	}
	if s.leaf == nil {
		return nil, errSignature
	}
	return s, nil
}

// check verifies the signature over the attributes, and the digest of the statement in them.
func (s *signer) check(info signerInfo, statement []byte) error {
	h := hashOf(info.Digest)
	key, ok := s.leaf.PublicKey.(*rsa.PublicKey)
	if !ok || h == 0 || len(info.Attributes.FullBytes) == 0 {
		return errSignature
	}
	sum := h.New()
	sum.Write(statement)
	found := false
	for rest := info.Attributes.Bytes; len(rest) > 0; {
		var a attribute
		var value []byte
		var err error
		if rest, err = asn1.Unmarshal(rest, &a); err != nil {
			return errSignature
		}
		if !a.ID.Equal(oidMessageDigest) {
			continue
		}
		if _, err := asn1.Unmarshal(a.Values.Bytes, &value); err != nil || found || !bytes.Equal(value, sum.Sum(nil)) {
			return errSignature
		}
		found = true
	}
	if !found {
		return errSignature
	}
	attributes := bytes.Clone(info.Attributes.FullBytes)
	attributes[0] = asn1.TagSet | 0x20 // they were signed with the tag of a SET
	signed := h.New()
	signed.Write(attributes)
	if rsa.VerifyPKCS1v15(key, h, signed.Sum(nil), info.Signature) != nil {
		return errSignature
	}
	return nil
}

// leadsTo reports whether the signer's certificate is the given one, or was issued by it,
// directly or through certificates in the signature.
func (s *signer) leadsTo(anchor *x509.Certificate) bool {
	seen := map[string]bool{}
	next := []*x509.Certificate{s.leaf}
	for len(next) > 0 {
		c := next[0]
		next = next[1:]
		if seen[string(c.Raw)] {
			continue
		}
		seen[string(c.Raw)] = true
		if c.Equal(anchor) || issued(anchor, c) {
			return true
		}
		for _, i := range s.certs {
			if !seen[string(i.Raw)] && issued(i, c) {
				next = append(next, i)
			}
		}
	}
	return false
}

func issued(issuer, c *x509.Certificate) bool {
	return bytes.Equal(issuer.RawSubject, c.RawIssuer) &&
		issuer.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil
}
