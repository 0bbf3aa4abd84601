package bootstate_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/bootstate"
)

func pemOf(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

func pkcs8(key any) string { return pemOf("PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(key))) }
func spki(key any) string  { return pemOf("PUBLIC KEY", must(x509.MarshalPKIXPublicKey(key))) }

func TestParseKeys(t *testing.T) {
	r, e := signers()["RSA"].(*rsa.PrivateKey), signers()["P-384"].(*ecdsa.PrivateKey)
	for name, c := range map[string]struct {
		private, public string
		want            crypto.Signer
	}{
		"RSA, PKCS #8":        {pkcs8(r), spki(&r.PublicKey), r},
		"RSA, PKCS #1":        {pemOf("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(r)), pemOf("RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(&r.PublicKey)), r},
		"ECDSA, PKCS #8":      {pkcs8(e), spki(&e.PublicKey), e},
		"ECDSA, SEC 1":        {pemOf("EC PRIVATE KEY", must(x509.MarshalECPrivateKey(e))), spki(&e.PublicKey), e},
		"after parameters":    {pemOf("EC PARAMETERS", []byte{6, 5, 0x2b, 0x81, 4, 0, 0x22}) + pemOf("EC PRIVATE KEY", must(x509.MarshalECPrivateKey(e))), spki(&e.PublicKey) + "\n\x00\x00", e},
		"text before a block": {"Key:\n" + pkcs8(e), "Key:\n" + spki(&e.PublicKey), e},
	} {
		signer, err := bootstate.ParsePrivateKey([]byte(c.private))
		if err != nil || !signer.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(c.want.Public()) {
			t.Errorf("%s: private key: %v", name, err)
		}
		pub, err := bootstate.ParsePublicKey([]byte(c.public))
		if err != nil || !pub.(interface{ Equal(crypto.PublicKey) bool }).Equal(c.want.Public()) {
			t.Errorf("%s: public key: %v", name, err)
		}
	}
}

func TestParseKeysRefuses(t *testing.T) {
	e := signers()["P-256"].(*ecdsa.PrivateKey)
	edPub, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	odd := signers()["RSA"].(*rsa.PrivateKey).PublicKey
	odd.E = 3
	p521 := must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))
	encrypted := `-----BEGIN RSA PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-256-CBC,00112233445566778899AABBCCDDEEFF

AAAA
-----END RSA PRIVATE KEY-----
`
	for name, c := range map[string]struct{ file, private, public string }{
		"nothing":           {"", "no PEM block", "no PEM block"},
		"DER":               {"\x30\x82", "no PEM block", "no PEM block"},
		"Ed25519":           {pkcs8(ed), "Ed25519 key, which TPMs don't verify; make one", "this is a private key"},
		"Ed25519, public":   {spki(edPub), "this is a public key", "Ed25519 key, which TPMs don't verify; make one"},
		"encrypted, PKCS 8": {pemOf("ENCRYPTED PRIVATE KEY", []byte{1}), "it is encrypted; decrypt", "this is a private key"},
		"encrypted, old":    {encrypted, "it is encrypted; decrypt", "this is a private key"},
		"a certificate":     {pemOf("CERTIFICATE", []byte{1}), `a PEM block "CERTIFICATE"`, `a PEM block "CERTIFICATE"`},
		"two keys":          {pkcs8(e) + pkcs8(e), "something follows", "something follows"},
		"garbage":           {pemOf("PRIVATE KEY", []byte{1, 2}), "does not parse", "this is a private key"},
		"public garbage":    {pemOf("PUBLIC KEY", []byte{1, 2}), "this is a public key", "public key: "},
		"P-521":             {pkcs8(p521), "unsupported curve; want P-256 or P-384; make one", "this is a private key"},
		"P-521, public":     {spki(&p521.PublicKey), "this is a public key", "unsupported curve; want P-256 or P-384; make one"},
		"exponent 3":        {spki(&odd), "this is a public key", "exponent 3, want 65537"},
		"only parameters":   {pemOf("EC PARAMETERS", []byte{1}), "no PEM block", "no PEM block"},
		"too large":         {strings.Repeat("x", 65<<10), "want at most 65536", "want at most 65536"},
	} {
		if _, err := bootstate.ParsePrivateKey([]byte(c.file)); err == nil || !strings.Contains(err.Error(), c.private) {
			t.Errorf("%s, as a private key: %v, want %q", name, err, c.private)
		}
		if _, err := bootstate.ParsePublicKey([]byte(c.file)); err == nil || !strings.Contains(err.Error(), c.public) {
			t.Errorf("%s, as a public key: %v, want %q", name, err, c.public)
		}
	}
}

func FuzzParseKeys(f *testing.F) {
	for _, s := range signers() {
		f.Add([]byte(pkcs8(s)))
		f.Add([]byte(spki(s.Public())))
	}
	f.Add(read(f, "systemd-252-rsa.pub.pem"))
	f.Add([]byte(pemOf("EC PARAMETERS", []byte{1})))
	f.Fuzz(func(t *testing.T, b []byte) {
		if pub, err := bootstate.ParsePublicKey(b); err == nil {
			if _, err := bootstate.KeyFingerprint(pub); err != nil {
				t.Fatal(err)
			}
		}
		if signer, err := bootstate.ParsePrivateKey(b); err == nil {
			if _, err := bootstate.KeyFingerprint(signer.Public()); err != nil {
				t.Fatal(err)
			}
		}
	})
}
