package ekcert

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// MaxSize bounds a certificate, in bytes. NV indices hold 2048 on most TPMs.
const MaxSize = 8 << 10

// The reasons for refusing a certificate.
var (
	// ErrMalformed: it does not parse.
	ErrMalformed = errors.New("the EK certificate does not parse")
	// ErrOtherKey: the certificate is for a key other than the EK.
	ErrOtherKey = errors.New("the EK certificate is not this endorsement key's")
	// ErrNotEK: the certificate was not issued for an EK.
	ErrNotEK = errors.New("the certificate is not one for an endorsement key")
	// ErrTime: the certificate, or a CA's, is not yet valid or no longer valid.
	ErrTime = errors.New("the EK certificate is not valid at this time")
	// ErrUntrusted: no root of the bundle vouches for it.
	ErrUntrusted = errors.New("no CA of the bundle vouches for the EK certificate")
)

// byDigest is the hint for an operator who knows the machine but not the maker of its
// TPM.
const byDigest = "or allow this endorsement key by its digest"

// Verified is the result of Verify.
type Verified struct {
	// Certificate is the EK's certificate.
	Certificate *x509.Certificate
	// Chain leads from Certificate to a root of the bundle, both included.
	Chain []*x509.Certificate
	// Quirks names the tolerated deviations of Certificate, such as "padding".
	Quirks []string
}

// Verify reports whether a TPM's maker states that ek is a TPM's endorsement key. nv is
// the certificate, in DER, as read from NV memory. Verify checks, in this order:
//
//  1. nv is one X.509 certificate of version 3, at most MaxSize bytes, except for the quirks
//     that this package lists.
//  2. Its key is ek: RSA of 2048 bits or more, or ECDSA on P-256 or P-384. The caller must still
//     check by TPM2_ActivateCredential that the other side holds ek.
//  3. It is not a CA's, and its key usage is that of an EK: key encipherment for RSA, key
//     agreement for ECC, and nothing that signs certificates.
//  4. Signatures lead to a root of the bundle through CAs of the bundle. Each certificate is
//     valid at now and has no critical extension that nobody understood, except for the EK's
//     subject alternative name.
//  5. It was issued for EKs: its extended key usage has tcg-kp-EKCertificate (2.23.133.8.1), or
//     it has none and the issuer's has; and no CA in between is limited to other purposes.
//
// The error is, or wraps, one of this package's errors, and ends in a hint. Verify does
// not judge what the subject alternative name says of the TPM.
func (b *Bundle) Verify(nv []byte, ek crypto.PublicKey, now time.Time) (*Verified, error) {
	v, err := read(nv)
	if err != nil {
		return nil, err
	}
	if err := checkKey(v.Certificate, ek); err != nil {
		return nil, err
	}
	if err := checkUsage(v.Certificate); err != nil {
		return nil, err
	}
	chains, err := v.Certificate.Verify(x509.VerifyOptions{
		Roots: b.roots, Intermediates: b.intermediates, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, // crypto/x509 does not know the TCG's key usage: see forEK
	})
	if err != nil {
		return nil, b.explain(v.Certificate, err)
	}
	at := slices.IndexFunc(chains, forEK)
	if at < 0 {
		return nil, fmt.Errorf("%w: neither it nor its issuer has the extended key usage %v, or a CA between is limited to others; check that it was read from the EK's NV index, %s", ErrNotEK, oidEK, byDigest)
	}
	v.Chain = chains[at]
	return v, nil
}

func read(nv []byte) (*Verified, error) {
	if len(nv) > MaxSize {
		return nil, fmt.Errorf("%w: it has %d bytes, want at most %d; check that it was read from the EK's NV index", ErrMalformed, len(nv), MaxSize)
	}
	c, quirks, err := parse(nv)
	if err != nil {
		return nil, fmt.Errorf("%w: %w; check that it was read from the EK's NV index whole, %s", ErrMalformed, err, byDigest)
	}
	quirks = append(quirks, applied(contentQuirks, c)...)
	return &Verified{Certificate: c.cert, Quirks: quirks}, nil
}

func checkKey(cert *x509.Certificate, ek crypto.PublicKey) error {
	var same bool
	switch k := cert.PublicKey.(type) {
	case *rsa.PublicKey:
		if k.N.BitLen() < 2048 {
			return fmt.Errorf("%w: an RSA key of %d bits, want at least 2048; %s", ErrNotEK, k.N.BitLen(), replace)
		}
		same = k.Equal(ek)
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
			return fmt.Errorf("%w: a key on the curve %s, want P-256 or P-384; %s", ErrNotEK, k.Curve.Params().Name, replace)
		}
		same = k.Equal(ek)
	default:
		return fmt.Errorf("%w: a key of type %T, want RSA or ECDSA; %s", ErrNotEK, cert.PublicKey, replace)
	}
	if !same {
		return fmt.Errorf("%w: its key differs; check that it belongs to this TPM and this kind of key (RSA, P-256, P-384)", ErrOtherKey)
	}
	return nil
}

const replace = "check that the certificate is an endorsement key's"

// certifies are the key usages that would let an EK vouch for others.
const certifies = x509.KeyUsageCertSign | x509.KeyUsageCRLSign

func checkUsage(cert *x509.Certificate) error {
	want, name := x509.KeyUsageKeyAgreement, "key agreement"
	if _, ok := cert.PublicKey.(*rsa.PublicKey); ok {
		want, name = x509.KeyUsageKeyEncipherment, "key encipherment"
	}
	switch {
	case cert.Version != 3:
		return fmt.Errorf("%w: its version is %d, want 3; %s", ErrNotEK, cert.Version, replace)
	case cert.IsCA || cert.KeyUsage&certifies != 0:
		return fmt.Errorf("%w: it is a CA's; %s", ErrNotEK, replace)
	case cert.KeyUsage&want == 0:
		return fmt.Errorf("%w: its key usage lacks %s; %s", ErrNotEK, name, replace)
	}
	return nil
}

// forEK reports whether a chain ends in a certificate for an EK. Every CA above a
// certificate, except the trusted root, limits what the certificate may be used for.
// Some makers write the purpose only into the certificate of the issuing CA.
func forEK(chain []*x509.Certificate) bool {
	says := chain[0]
	if !limited(says) && len(chain) > 1 {
		says = chain[1]
	}
	if !namesEK(says) {
		return false
	}
	for _, ca := range chain[1 : len(chain)-1] {
		if limited(ca) && !namesEK(ca) && !slices.Contains(ca.ExtKeyUsage, x509.ExtKeyUsageAny) {
			return false
		}
	}
	return true
}

func limited(c *x509.Certificate) bool { return len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) > 0 }

func namesEK(c *x509.Certificate) bool { return slices.ContainsFunc(c.UnknownExtKeyUsage, oidEK.Equal) }

// explain says what an operator can do about a chain that does not verify.
func (b *Bundle) explain(cert *x509.Certificate, err error) error {
	invalid, isInvalid := errors.AsType[x509.CertificateInvalidError](err)
	switch {
	case isInvalid && invalid.Reason == x509.Expired:
		return fmt.Errorf("%w: %w; check this machine's clock, renew the bundle, %s", ErrTime, err, byDigest)
	case isInvalid:
		return fmt.Errorf("%w: %w; see which CA of the bundle issued it, %s", ErrUntrusted, err, byDigest)
	case len(cert.UnhandledCriticalExtensions) > 0:
		return fmt.Errorf("%w: it has the critical extension %v, which kleidi does not know; allow this endorsement key by its digest", ErrUntrusted, cert.UnhandledCriticalExtensions[0])
	case cert.SignatureAlgorithm == x509.SHA1WithRSA || cert.SignatureAlgorithm == x509.ECDSAWithSHA1:
		return fmt.Errorf("%w: it is signed with SHA-1, which no longer proves anything; allow this endorsement key by its digest", ErrUntrusted)
	}
	return fmt.Errorf("%w (roots: %d, intermediates: %d): %w; add its issuer %s to the bundle%s, %s",
		ErrUntrusted, b.numRoots, b.numIntermediates, err, issuer(cert), source(cert), byDigest)
}

// issuer names a certificate's issuer, as the certificate claims.
func issuer(cert *x509.Certificate) string { return fmt.Sprintf("%.200q", cert.Issuer.String()) }

// source returns where, according to the certificate, its issuer's certificate is
// available.
func source(cert *x509.Certificate) string {
	if len(cert.IssuingCertificateURL) == 0 {
		return ""
	}
	return fmt.Sprintf(" (it says: %.200q)", cert.IssuingCertificateURL[0])
}
