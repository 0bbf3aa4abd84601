package ekcert_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/beezy-dev/kleidi/tpm/ekcert"
)

// TestVerify: certificates as the profile demands verify, for each kind of EK, with and
// without an intermediate.
func TestVerify(t *testing.T) {
	root := (*ca)(nil).newCA("root")
	middle := root.newCA("middle")
	b := bundle(t, root, middle)
	for kind, ek := range eks() {
		for issuer, n := range map[*ca]int{root: 2, middle: 3} {
			v, err := b.Verify(issuer.ekCert(ek.Public()), ek.Public(), now)
			if err != nil {
				t.Errorf("%s: %v", kind, err)
				continue
			}
			if len(v.Chain) != n || v.Chain[0] != v.Certificate || !slices.Equal(v.Quirks, []string{"critical-san"}) {
				t.Errorf("%s: chain of %d, quirks %v", kind, len(v.Chain), v.Quirks)
			}
		}
	}
}

// TestQuirks: each deviation that makers are known for is tolerated, and named.
func TestQuirks(t *testing.T) {
	root := (*ca)(nil).newCA("root")
	middle := root.newCA("middle", limit(oidEK))
	oddRoot := (*ca)(nil).newCA("odd root")
	oddRoot.der = oddRoot.forge(oddRoot.der, negative)
	oddMiddle := oddRoot.newCA("odd middle")
	oddMiddle.der = oddRoot.forge(oddMiddle.der, negative)
	any := root.newCA("any", anyUsage)
	b := bundle(t, root, middle, oddRoot, oddMiddle, any)
	ek := eks()["RSA-2048"].Public()
	good := root.ekCert(ek)
	header := append([]byte{0x10, 0x01, 0x00, byte(len(good) >> 8), byte(len(good))}, good...)
	for name, c := range map[string]struct {
		nv     []byte
		quirks []string
	}{
		"padded with zeros":            {append(bytes.Clone(good), make([]byte, 700)...), []string{"padding", "critical-san"}},
		"padded with ones":             {append(bytes.Clone(good), bytes.Repeat([]byte{0xff}, 700)...), []string{"padding", "critical-san"}},
		"a TPM 1.2's header":           {header, []string{"tcg-header", "critical-san"}},
		"header and padding":           {append(header, 0, 0), []string{"tcg-header", "critical-san"}},
		"negative serial":              {root.forge(good, negative), []string{"negative-serial", "critical-san"}},
		"negative serial, padded":      {append(root.forge(good, negative), 0), []string{"padding", "negative-serial", "critical-san"}},
		"OAEP key":                     {root.forge(good, oaep), []string{"critical-san", "oaep-key"}},
		"SAN not critical":             {root.ekCert(ek, func(t *x509.Certificate) { t.ExtraExtensions[0].Critical = false }), nil},
		"no SAN":                       {root.ekCert(ek, func(t *x509.Certificate) { t.ExtraExtensions = nil }), nil},
		"a subject":                    {root.ekCert(ek, func(t *x509.Certificate) { t.Subject.CommonName = "TPM" }), []string{"critical-san"}},
		"other purposes too":           {root.ekCert(ek, limit(oidAIK, oidEK)), []string{"critical-san"}},
		"no end (9999-12-31)":          {root.ekCert(ek, func(t *x509.Certificate) { t.NotAfter = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) }), []string{"critical-san"}},
		"an issuer for any purpose":    {any.ekCert(ek), []string{"critical-san"}},
		"purpose only at the issuer":   {middle.ekCert(ek, limit()), []string{"critical-san"}},
		"issuers with negative serial": {oddMiddle.ekCert(ek), []string{"critical-san"}},
	} {
		v, err := b.Verify(c.nv, ek, now)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if !slices.Equal(v.Quirks, c.quirks) {
			t.Errorf("%s: quirks %v, want %v", name, v.Quirks, c.quirks)
		}
	}
	odd := root.forge(good, negative)
	v, err := b.Verify(odd, ek, now)
	if err != nil || v.Certificate.SerialNumber.Int64() != -0x79 || !bytes.Equal(v.Certificate.Raw, odd) {
		t.Errorf("negative serial: %v", err)
	}
}

// limit sets the extended key usages.
func limit(to ...asn1.ObjectIdentifier) func(*x509.Certificate) {
	return func(t *x509.Certificate) { t.UnknownExtKeyUsage = to }
}

func anyUsage(t *x509.Certificate) { t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }

// TestRefuses: each condition of Verify, violated alone.
func TestRefuses(t *testing.T) {
	root, stranger := (*ca)(nil).newCA("root"), (*ca)(nil).newCA("root") // of the same name
	middle, missing := root.newCA("middle"), root.newCA("missing")
	aikOnly := root.newCA("aik only", limit(oidAIK))
	below := aikOnly.newCA("below it", limit(oidEK))
	noCAs := root.newCA("no CAs below", func(t *x509.Certificate) { t.MaxPathLenZero = true })
	belowNoCAs := noCAs.newCA("below")
	expired := root.newCA("expired", func(t *x509.Certificate) { t.NotAfter = start.AddDate(1, 0, 0) })
	odd := root.newCA("critical", func(t *x509.Certificate) {
		t.ExtraExtensions = []pkix.Extension{{Id: oidTest, Critical: true, Value: []byte{5, 0}}}
	})
	aikRoot, any := (*ca)(nil).newCA("aik root", limit(oidAIK)), root.newCA("any", anyUsage)
	b := bundle(t, root, aikRoot, any, middle, aikOnly, below, noCAs, belowNoCAs, expired, odd)
	ek, ecc := eks()["RSA-2048"].Public(), eks()["P-256"].Public()
	good := root.ekCert(ek)
	usage := func(u x509.KeyUsage) func(*x509.Certificate) {
		return func(t *x509.Certificate) { t.KeyUsage = u }
	}
	critical := func(t *x509.Certificate) {
		t.ExtraExtensions = append(t.ExtraExtensions, pkix.Extension{Id: oidTest, Critical: true, Value: []byte{5, 0}})
	}
	small := must(x509.ParsePKIXPublicKey(shortRSA(t)))
	p521 := must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader)).Public()
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1
	for name, c := range map[string]struct {
		nv   []byte
		ek   crypto.PublicKey
		want error
		says string
	}{
		"nothing":                 {nil, ek, ekcert.ErrMalformed, ""},
		"only padding":            {make([]byte, 1024), ek, ekcert.ErrMalformed, ""},
		"cut off":                 {good[:len(good)-1], ek, ekcert.ErrMalformed, ""},
		"something after it":      {append(bytes.Clone(good), 1), ek, ekcert.ErrMalformed, ""},
		"mixed padding":           {append(bytes.Clone(good), 0, 0xff), ek, ekcert.ErrMalformed, ""},
		"two certificates":        {append(bytes.Clone(good), good...), ek, ekcert.ErrMalformed, ""},
		"too large":               {append(bytes.Clone(good), make([]byte, ekcert.MaxSize)...), ek, ekcert.ErrMalformed, "want at most 8192"},
		"of another TPM":          {good, must(rsa.GenerateKey(rand.Reader, 2048)).Public(), ekcert.ErrOtherKey, "belongs to this TPM"},
		"of another kind":         {good, ecc, ekcert.ErrOtherKey, ""},
		"no EK given":             {good, nil, ekcert.ErrOtherKey, ""},
		"a CA":                    {middle.der, middle.key.Public(), ekcert.ErrNotEK, "a CA's"},
		"signs certificates":      {root.ekCert(ek, usage(x509.KeyUsageKeyEncipherment|x509.KeyUsageCertSign)), ek, ekcert.ErrNotEK, "a CA's"},
		"no key usage":            {root.ekCert(ek, usage(0)), ek, ekcert.ErrNotEK, "lacks key encipherment"},
		"a signing key":           {root.ekCert(ek, usage(x509.KeyUsageDigitalSignature)), ek, ekcert.ErrNotEK, "lacks key encipherment"},
		"RSA, key agreement":      {root.ekCert(ek, usage(x509.KeyUsageKeyAgreement)), ek, ekcert.ErrNotEK, "lacks key encipherment"},
		"ECC, key encipherment":   {root.ekCert(ecc, usage(x509.KeyUsageKeyEncipherment)), ecc, ekcert.ErrNotEK, "lacks key agreement"},
		"RSA of 1024 bits":        {root.ekCert(small), small, ekcert.ErrNotEK, "1024 bits"},
		"P-521":                   {root.ekCert(p521), p521, ekcert.ErrNotEK, "P-521"},
		"no purpose":              {root.ekCert(ek, limit()), ek, ekcert.ErrNotEK, "extended key usage 2.23.133.8.1"},
		"an AK's":                 {root.ekCert(ek, limit(oidAIK)), ek, ekcert.ErrNotEK, "extended key usage"},
		"a server's":              {root.ekCert(ek, limit(), func(t *x509.Certificate) { t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), ek, ekcert.ErrNotEK, "extended key usage"},
		"any purpose":             {root.ekCert(ek, limit(), anyUsage), ek, ekcert.ErrNotEK, "extended key usage"},
		"issuer limited to AKs":   {aikOnly.ekCert(ek), ek, ekcert.ErrNotEK, "limited to others"},
		"limited further up":      {below.ekCert(ek), ek, ekcert.ErrNotEK, "limited to others"},
		"limited further up, too": {below.ekCert(ek, limit()), ek, ekcert.ErrNotEK, "limited to others"},
		"root for AKs":            {aikRoot.ekCert(ek, limit()), ek, ekcert.ErrNotEK, "extended key usage"},
		"issuer for anything":     {any.ekCert(ek, limit()), ek, ekcert.ErrNotEK, "extended key usage"},
		"a CA that can't sign":    {root.ekCert(ek, func(t *x509.Certificate) { t.IsCA = true }), ek, ekcert.ErrNotEK, "a CA's"},
		"version 2":               {root.forge(good, version2), ek, ekcert.ErrNotEK, "version is 2, want 3"},
		"an RSA-PSS key":          {root.forge(good, pss), ek, ekcert.ErrNotEK, "want RSA or ECDSA"},
		"header of another size":  {append([]byte{0x10, 1, 0, 0xff, 0xff}, good...), ek, ekcert.ErrMalformed, ""},
		"unknown critical":        {root.ekCert(ek, critical), ek, ekcert.ErrUntrusted, "1.3.6.1.4.1.55555.1"},
		"issuer not in it":        {missing.ekCert(ek), ek, ekcert.ErrUntrusted, `(roots: 2, intermediates: 8): x509: certificate signed by unknown authority; add its issuer "CN=missing" to the bundle`},
		"a source":                {missing.ekCert(ek, func(t *x509.Certificate) { t.IssuingCertificateURL = []string{"http://ca.example/\n"} }), ek, ekcert.ErrUntrusted, `(it says: "http://ca.example/\n")`},
		"an impostor":             {stranger.ekCert(ek), ek, ekcert.ErrUntrusted, "add its issuer"},
		"self-signed":             {(*ca)(nil).issue(ekTemplate(ek), ek, eks()["RSA-2048"]), ek, ekcert.ErrUntrusted, ""},
		"signature":               {flipped, ek, ekcert.ErrUntrusted, ""},
		"issuer's path length":    {belowNoCAs.ekCert(ek), ek, ekcert.ErrUntrusted, "which CA"},
		"issuer's critical":       {odd.ekCert(ek), ek, ekcert.ErrUntrusted, ""},
		"issuer expired":          {expired.ekCert(ek), ek, ekcert.ErrTime, "clock"},
		"expired":                 {root.ekCert(ek, func(t *x509.Certificate) { t.NotAfter = now.Add(-time.Second) }), ek, ekcert.ErrTime, "clock"},
		"not yet valid":           {root.ekCert(ek, func(t *x509.Certificate) { t.NotBefore = now.Add(time.Second) }), ek, ekcert.ErrTime, "clock"},
		"SHA-1":                   {root.ekCert(ek, func(t *x509.Certificate) { t.SignatureAlgorithm = x509.ECDSAWithSHA1 }), ek, ekcert.ErrUntrusted, "SHA-1, which no longer"},
	} {
		v, err := b.Verify(c.nv, c.ek, now)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, %v, want %v with %q", name, v, err, c.want, c.says)
			continue
		}
		if strings.ContainsAny(err.Error(), "\n\x1b") || !strings.Contains(err.Error(), ";") {
			t.Errorf("%s: message %q", name, err)
		}
	}
}

// shortRSA is a key that Go no longer makes.
func shortRSA(t *testing.T) []byte {
	t.Helper()
	const key = `-----BEGIN PUBLIC KEY-----
MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDM5bjvTAQzlyKzT/S5NIYYT33T
FsM9ihgyD6ND2VxEGZJIVMloC1l8rPgoDsZY5cbU3m3A68q9JNtGjN3liSnZrx+v
LpScr3A8oOU8qysRPDvew7q5ZacCjR9UvpeIBoeML2aREipZ2crxhlTqteybaBQo
53Ex7/wCGFS8aHPNbwIDAQAB
-----END PUBLIC KEY-----`
	block, _ := pem.Decode([]byte(key))
	if block == nil {
		t.Fatal("no key")
	}
	return block.Bytes
}

// TestSwtpm: certificates of swtpm's local CA, of both kinds of EK that
// swtpm_setup makes.
func TestSwtpm(t *testing.T) {
	b, err := ekcert.LoadBundle(os.DirFS("testdata"))
	if err == nil || !strings.Contains(err.Error(), "swtpm-ek-rsa2048.der: ") || !strings.Contains(err.Error(), "is no CA") {
		t.Fatalf("a folder with EK certificates: %v, %v", b, err)
	}
	files := fstest.MapFS{}
	for _, name := range []string{"swtpm-localca.pem", "swtpm-localca-rootca.pem"} {
		files[name] = &fstest.MapFile{Data: must(os.ReadFile("testdata/" + name))}
	}
	b = load(t, files)
	if b.Roots() != 1 || b.Intermediates() != 1 {
		t.Errorf("%d roots, %d intermediates", b.Roots(), b.Intermediates())
	}
	at := time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)
	for _, name := range []string{"swtpm-ek-rsa2048.der", "swtpm-ek-p384.der"} {
		nv := must(os.ReadFile("testdata/" + name))
		ek := must(x509.ParseCertificate(nv)).PublicKey
		v, err := b.Verify(nv, ek, at)
		if err != nil || len(v.Chain) != 3 {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := b.Verify(nv, ek, now.AddDate(-1, 0, 0)); !errors.Is(err, ekcert.ErrTime) {
			t.Errorf("%s, before its time: %v", name, err)
		}
		if _, err := bundle(t, (*ca)(nil).newCA("another")).Verify(nv, ek, at); !errors.Is(err, ekcert.ErrUntrusted) {
			t.Errorf("%s, by another CA: %v", name, err)
		}
	}
}

// TestGoogle: the EK certificates of Google's vTPMs, from go-tpm-tools' test data,
// have no extended key usage; that of the issuing CA says that they are for EKs. The
// same CA's certificates for AKs are refused.
func TestGoogle(t *testing.T) {
	in := func(name string) []byte { return must(os.ReadFile("testdata/google/" + name)) }
	b := load(t, fstest.MapFS{
		"root.crt":  {Data: in("gcp_ek_ak_ca_root.crt")},
		"inter.crt": {Data: in("gcp_ek_ak_ca_intermediate_v3.crt")},
	})
	for name, want := range map[string]error{
		"pca_tpm_rsa_enc_cert": nil, "pca_tpm_ecc_enc_cert": nil,
		"pca_tpm_rsa_sign_cert": ekcert.ErrNotEK, "pca_tpm_ecc_sign_cert": ekcert.ErrNotEK,
	} {
		block, _ := pem.Decode(in(name + ".pem"))
		ek := must(x509.ParseCertificate(block.Bytes)).PublicKey
		if _, err := b.Verify(block.Bytes, ek, now); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
}

func FuzzVerify(f *testing.F) {
	root := (*ca)(nil).newCA("root")
	middle := root.newCA("middle", limit(oidEK))
	b := bundle(f, root, middle)
	ek := eks()["P-256"].Public()
	rsaEK := eks()["RSA-2048"].Public()
	good := root.ekCert(ek)
	genuine := map[string]bool{}
	for _, der := range [][]byte{good, middle.ekCert(ek, limit()), root.forge(good, negative), root.ekCert(rsaEK), root.forge(root.ekCert(rsaEK), oaep)} {
		f.Add(der)
		f.Add(append(bytes.Clone(der), 0, 0, 0))
		f.Add(append([]byte{0x10, 1, 0, byte(len(der) >> 8), byte(len(der))}, der...))
		genuine[signed(der)] = true
	}
	f.Add(must(os.ReadFile("testdata/swtpm-ek-p384.der")))
	f.Fuzz(func(t *testing.T, nv []byte) {
		for _, key := range []crypto.PublicKey{ek, rsaEK} {
			v, err := b.Verify(nv, key, now)
			if err == nil && !genuine[string(v.Certificate.RawTBSCertificate)] {
				t.Fatalf("accepted %x", nv)
			}
		}
	})
}

// signed is the part of a certificate that its issuer signed.
func signed(der []byte) string {
	var outer asn1.RawValue
	var tbs asn1.RawValue
	must(asn1.Unmarshal(der, &outer))
	must(asn1.Unmarshal(outer.Bytes, &tbs))
	return string(tbs.FullBytes)
}
