package ekcert

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"
)

var (
	oidSAN       = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidRSAESOAEP = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 7}
	// oidEK is tcg-kp-EKCertificate.
	oidEK = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
)

// quirk is a tolerated deviation. apply repairs it and reports whether it was present.
type quirk struct {
	id    string
	what  string
	apply func(*candidate) bool
}

// candidate is a certificate under examination: der is parsed, raw is what the issuer
// signed.
type candidate struct {
	der, raw []byte
	serial   *big.Int // the serial number in raw, if der has another
	cert     *x509.Certificate
}

// encodingQuirks are repaired before a certificate is parsed.
var encodingQuirks = []quirk{
	{"tcg-header", "stored with the header of a TPM 1.2 (TCG PC Client Specific Implementation, 7.3.2)", stripHeader},
	{"padding", "followed by what fills its NV index up", stripPadding},
	{"negative-serial", "its serial number is negative", hideNegativeSerial},
}

// contentQuirks are repaired in an EK's certificate, not in a CA's.
var contentQuirks = []quirk{
	{"critical-san", "its subject alternative name, which names the TPM's maker, is critical and crypto/x509 doesn't read it", handleSAN},
	{"oaep-key", "its key is marked for RSAES-OAEP only", readOAEPKey},
}

func applied(quirks []quirk, c *candidate) (ids []string) {
	for _, q := range quirks {
		if q.apply(c) {
			ids = append(ids, q.id)
		}
	}
	return ids
}

// parse reads one certificate, with the quirks of its encoding. It keeps the bytes that
// the issuer signed unchanged.
func parse(b []byte) (*candidate, []string, error) {
	c := &candidate{der: b, raw: b}
	ids := applied(encodingQuirks, c)
	cert, err := x509.ParseCertificate(c.der)
	if err != nil {
		return nil, nil, err
	}
	if c.serial != nil {
		outer, tbs, _, err := layers(c.raw)
		if err != nil {
			return nil, nil, err
		}
		header := len(outer.FullBytes) - len(outer.Bytes)
		cert.Raw, cert.SerialNumber = c.raw, c.serial
		cert.RawTBSCertificate = c.raw[header : header+len(tbs.FullBytes)]
	}
	c.cert = cert
	return c, ids, nil
}

// stripHeader: tag 0x1001, type 0, and the length in 2 bytes.
func stripHeader(c *candidate) bool {
	const size = 5
	if len(c.der) < size || !bytes.HasPrefix(c.der, []byte{0x10, 0x01, 0x00}) {
		return false
	}
	n := int(binary.BigEndian.Uint16(c.der[3:size]))
	if len(c.der) < size+n {
		return false
	}
	c.der = c.der[size : size+n]
	c.raw = c.der
	return true
}

// stripPadding drops zeros, or the ones of erased memory, and nothing else.
func stripPadding(c *candidate) bool {
	var v asn1.RawValue
	rest, err := asn1.Unmarshal(c.der, &v)
	if err != nil || len(rest) == 0 {
		return false
	}
	for _, fill := range []byte{0, 0xff} {
		if bytes.Count(rest, []byte{fill}) == len(rest) {
			c.der = c.der[:len(c.der)-len(rest)]
			c.raw = c.der
			return true
		}
	}
	return false
}

// hideNegativeSerial gives der a positive serial number of the same size, so that der
// parses.
func hideNegativeSerial(c *candidate) bool {
	outer, tbs, serial, err := layers(c.der)
	if err != nil || len(serial.Bytes) == 0 || serial.Bytes[0]&0x80 == 0 {
		return false
	}
	var n *big.Int
	if _, err := asn1.Unmarshal(serial.FullBytes, &n); err != nil {
		return false
	}
	at := len(c.der) - len(outer.Bytes) + len(tbs.FullBytes) - len(tbs.Bytes)
	if v, ok := version(tbs); ok {
		at += len(v.FullBytes)
	}
	at += len(serial.FullBytes) - len(serial.Bytes)
	c.serial, c.der = n, bytes.Clone(c.der)
	c.der[at] = 0x40 // positive, and the shortest encoding of something
	return true
}

// layers splits a certificate into its parts up to the serial number.
func layers(der []byte) (outer, tbs, serial asn1.RawValue, err error) {
	rest, err := asn1.Unmarshal(der, &outer)
	if err == nil && len(rest) > 0 {
		err = errors.New("something follows the certificate")
	}
	if err != nil {
		return outer, tbs, serial, err
	}
	if _, err = asn1.Unmarshal(outer.Bytes, &tbs); err != nil {
		return outer, tbs, serial, err
	}
	fields := tbs.Bytes
	if v, ok := version(tbs); ok {
		fields = fields[len(v.FullBytes):]
	}
	if _, err = asn1.Unmarshal(fields, &serial); err != nil {
		return outer, tbs, serial, err
	}
	if serial.Class != asn1.ClassUniversal || serial.Tag != asn1.TagInteger {
		err = errors.New("no serial number")
	}
	return outer, tbs, serial, err
}

// version returns the version field, which comes first unless it is left out.
func version(tbs asn1.RawValue) (v asn1.RawValue, ok bool) {
	_, err := asn1.Unmarshal(tbs.Bytes, &v)
	return v, err == nil && v.Class == asn1.ClassContextSpecific && v.Tag == 0
}

// handleSAN removes the subject alternative name, and nothing else, from the list of
// critical extensions that nobody handled.
func handleSAN(c *candidate) bool {
	before := len(c.cert.UnhandledCriticalExtensions)
	c.cert.UnhandledCriticalExtensions = slices.DeleteFunc(c.cert.UnhandledCriticalExtensions, oidSAN.Equal)
	return len(c.cert.UnhandledCriticalExtensions) < before
}

// readOAEPKey reads an RSA key whose algorithm identifier is id-RSAES-OAEP.
func readOAEPKey(c *candidate) bool {
	if c.cert.PublicKey != nil {
		return false
	}
	key, err := oaepKey(c.cert.RawSubjectPublicKeyInfo)
	if err != nil {
		return false
	}
	c.cert.PublicKey, c.cert.PublicKeyAlgorithm = key, x509.RSA
	return true
}

func oaepKey(spki []byte) (any, error) {
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	rest, err := asn1.Unmarshal(spki, &info)
	if err != nil {
		return nil, err
	}
	if len(rest) > 0 || !info.Algorithm.Algorithm.Equal(oidRSAESOAEP) {
		return nil, fmt.Errorf("algorithm %v", info.Algorithm.Algorithm)
	}
	return x509.ParsePKCS1PublicKey(info.Key.RightAlign())
}
