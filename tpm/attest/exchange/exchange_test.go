package exchange

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
)

var purpose = Purpose{Transcript: "test transcript v1", Proof: "test proof v1", Exporter: "EXPORTER-test-v1"}

func spki(t testing.TB, key crypto.PublicKey) []byte {
	t.Helper()
	b, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func ecdsaKey(t testing.TB, c elliptic.Curve) *ecdsa.PublicKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &k.PublicKey
}

func rsaKey(t testing.TB, bits int) *rsa.PublicKey {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return &k.PublicKey
}

// someAK is the public area of an attestation key that no TPM holds.
func someAK() tpm2.TPMTPublic {
	ak := tpm2.ECCSRKTemplate
	ak.ObjectAttributes = tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true}
	ak.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256, Scheme: tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA,
		Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})}})
	return ak
}

// someClaims are the claims of a machine that does not exist.
func someClaims(t testing.TB) *Claims {
	t.Helper()
	return &Claims{Cluster: make([]byte, 16), Node: "alpha", EK: spki(t, ecdsaKey(t, elliptic.P256())), AK: tpm2.Marshal(someAK()), SRK: make([]byte, NameSize), Context: []byte("context")}
}

func wantRefusal(t *testing.T, what string, err error, check Check, words string) {
	t.Helper()
	r, ok := errors.AsType[*Refusal](err)
	if !ok || r.Check != check || !strings.Contains(err.Error(), words) || r.Hint == "" {
		t.Errorf("%s: %v, want a refusal by %q with %q", what, err, check, words)
	}
}

// TestOnce: an exchange accepts one answer, and only in order.
func TestOnce(t *testing.T) {
	claims, exporter := someClaims(t), make([]byte, ExporterSize)
	begin := func() *Pending {
		p, c, err := purpose.Begin(claims, exporter, crypto.SHA256, []int{4, 7})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Check(); err != nil {
			t.Error(err)
		}
		return p
	}
	var policy bootpolicy.BootPolicy
	p := begin()
	_, err := p.Judge(&Evidence{}, &policy)
	wantRefusal(t, "not proven", err, CheckProof, "was not answered")
	wantRefusal(t, "a wrong answer", p.Prove(nil), CheckProof, "")
	wantRefusal(t, "then the right one", p.Prove(purpose.Answer(p.secret, p.digest)), CheckProof, "answered before")
	other := purpose
	other.Proof = "other proof v1"
	p = begin()
	wantRefusal(t, "the answer of another purpose", p.Prove(other.Answer(p.secret, p.digest)), CheckProof, "not on the TPM")
	p = begin()
	if err := p.Prove(purpose.Answer(p.secret, p.digest)); err != nil {
		t.Fatal(err)
	}
	_, err = p.Judge(&Evidence{}, &policy)
	wantRefusal(t, "no quote", err, CheckEvidence, "quote")
	_, err = p.Judge(&Evidence{}, &policy)
	wantRefusal(t, "a second try", err, CheckProof, "was not answered")
	if _, _, err := purpose.Begin(claims, nil, crypto.SHA256, []int{4}); err == nil {
		t.Error("without a TLS exporter")
	}
	a, b := begin(), begin()
	if string(a.secret) == string(b.secret) || string(a.digest) == string(b.digest) || len(a.secret) != 32 || len(a.Transcript()) != 32 {
		t.Error("two exchanges have the same secret or transcript")
	}
}

// TestTranscript: each field and each label counts.
func TestTranscript(t *testing.T) {
	base := Transcript{Cluster: seal.ClusterID{1}, Node: "ab", Nonce: []byte("cd"), Exporter: []byte("ef"), Context: []byte("gh"), EK: []byte("ij"), AK: []byte("kl"), SRK: []byte("mn")}
	seen := map[string]string{}
	for name, change := range map[string]func(*Purpose, *Transcript){
		"none": func(*Purpose, *Transcript) {}, "purpose": func(p *Purpose, _ *Transcript) { p.Transcript = "other" },
		"cluster": func(_ *Purpose, x *Transcript) { x.Cluster[0]++ }, "node": func(_ *Purpose, x *Transcript) { x.Node = "b" },
		"nonce": func(_ *Purpose, x *Transcript) { x.Nonce = nil }, "exporter": func(_ *Purpose, x *Transcript) { x.Exporter = nil },
		"context": func(_ *Purpose, x *Transcript) { x.Context = nil }, "EK": func(_ *Purpose, x *Transcript) { x.EK = nil },
		"AK": func(_ *Purpose, x *Transcript) { x.AK = nil }, "SRK": func(_ *Purpose, x *Transcript) { x.SRK = nil },
		"moved": func(_ *Purpose, x *Transcript) { x.Exporter, x.Context = []byte("efg"), []byte("h") },
	} {
		p, c := purpose, base
		change(&p, &c)
		d := string(p.Digest(&c))
		if other, ok := seen[d]; ok || len(d) != 32 {
			t.Errorf("%s and %s have the same digest", name, other)
		}
		seen[d] = name
	}
	if bytes.Equal(Frame([]byte("a"), nil), Frame([]byte("a"))) {
		t.Error("an empty field is none")
	}
}

// TestEKClaims: only keys of the TCG's two templates.
func TestEKClaims(t *testing.T) {
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	x, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r, good := rsaKey(t, 2048), spki(t, ecdsaKey(t, elliptic.P256()))
	for name, b := range map[string][]byte{"RSA 3072": spki(t, rsaKey(t, 3072)), "P-384": spki(t, ecdsaKey(t, elliptic.P384())), "Ed25519": spki(t, ed), "X25519": spki(t, x.PublicKey()),
		"exponent 3": spki(t, &rsa.PublicKey{N: r.N, E: 3}), "a byte behind": append(bytes.Clone(good), 0), "truncated": good[:30], "text": []byte("EK")} {
		if _, err := encapsulationKey(b); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for name, b := range map[string][]byte{"RSA 2048": spki(t, r), "P-256": good} {
		if _, err := encapsulationKey(b); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestClaims: impossible sizes are refused.
func TestClaims(t *testing.T) {
	if err := someClaims(t).Check(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Claims){
		"cluster ID":              func(c *Claims) { c.Cluster = c.Cluster[1:] },
		"node name":               func(c *Claims) { c.Node = "" },
		"endorsement key":         func(c *Claims) { c.EK = make([]byte, MaxKey+1) },
		"certificate":             func(c *Claims) { c.EKCertificate = make([]byte, MaxCertificate+1) },
		"attestation key":         func(c *Claims) { c.AK = nil },
		"storage root key's Name": func(c *Claims) { c.SRK = c.SRK[1:] },
	} {
		c := someClaims(t)
		change(c)
		if err := c.Check(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAKClaims: the attestation key is the template's, byte by byte: bytes that a parser
// skips would give it another Name.
func TestAKClaims(t *testing.T) {
	good := tpm2.Marshal(someAK())
	if _, err := checkAK(good); err != nil {
		t.Fatal(err)
	}
	other := someAK()
	other.ObjectAttributes.Restricted = false
	for name, b := range map[string][]byte{"a byte behind": append(bytes.Clone(good), 0), "truncated": good[:len(good)-1], "none": nil, "unrestricted": tpm2.Marshal(other)} {
		if _, err := checkAK(b); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
