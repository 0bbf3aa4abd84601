package ekcert_test

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/beezy-dev/kleidi/tpm/ekcert"
)

// TestLoadBundle: PEM and DER, in folders, several in a file; a duplicate counts once;
// files with other names are skipped.
func TestLoadBundle(t *testing.T) {
	root, weak := (*ca)(nil).newCA("root"), (*ca)(nil).newCA("weak", func(t *x509.Certificate) { t.SignatureAlgorithm = x509.ECDSAWithSHA1 })
	a, b, old := root.newCA("a"), root.newCA("b"), (*ca)(nil).newCA("roll-over")
	rolledOver := old.newCA("roll-over") // a new key, signed by the old one
	bundle := load(t, fstest.MapFS{
		"README.txt":                  {Data: []byte("not a certificate")},
		"noextension":                 {Data: []byte("nor this")},
		"vendor/root/root.CER":        {Data: root.der},
		"vendor/root/again.pem":       {Data: append([]byte("# a comment\n"), asPEM(root.der)...)},
		"vendor/weak.pem":             {Data: asPEM(weak.der)},
		"vendor/intermediates/ab.crt": {Data: append(asPEM(a.der, b.der), "\nlast line"...)},
		"rolled.der":                  {Data: rolledOver.der},
		".hidden/other.pem":           {Data: []byte("-----BEGIN")},
		".hidden.pem":                 {Data: []byte("-----BEGIN")},
	})
	if bundle.Roots() != 2 || bundle.Intermediates() != 3 {
		t.Errorf("%d roots, %d intermediates, want 2 and 3", bundle.Roots(), bundle.Intermediates())
	}
	ek := eks()["P-256"].Public()
	if _, err := bundle.Verify(b.ekCert(ek), ek, now); err != nil {
		t.Error(err)
	}
	if _, err := bundle.Verify(rolledOver.ekCert(ek), ek, now); !errors.Is(err, ekcert.ErrUntrusted) {
		t.Errorf("a CA that its missing old key signed is a root: %v", err)
	}
}

// TestLoadBundleAsMounted: a ConfigMap's folder has its files as links into a
// hidden folder, beside a link to that folder.
func TestLoadBundleAsMounted(t *testing.T) {
	dir := t.TempDir()
	root := (*ca)(nil).newCA("root")
	data := filepath.Join(dir, "..2026_01_01")
	for _, err := range []error{
		os.Mkdir(data, 0o755),
		os.WriteFile(filepath.Join(data, "root.pem"), asPEM(root.der), 0o644),
		os.Symlink("..2026_01_01", filepath.Join(dir, "..data")),
		os.Symlink("..data/root.pem", filepath.Join(dir, "root.pem")),
		os.Symlink("..data", filepath.Join(dir, "folder.crt")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	b, err := ekcert.LoadBundle(os.DirFS(dir))
	if err != nil || b.Roots() != 1 {
		t.Fatalf("%v", err)
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "dangling.pem")); err != nil {
		t.Fatal(err)
	}
	if _, err := ekcert.LoadBundle(os.DirFS(dir)); err == nil || !strings.Contains(err.Error(), "dangling.pem") {
		t.Errorf("a dangling link: %v", err)
	}
	if _, err := ekcert.LoadBundle(os.DirFS(filepath.Join(dir, "none"))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
}

func TestLoadBundleRefuses(t *testing.T) {
	root := (*ca)(nil).newCA("root")
	whole := asPEM(root.der)
	server := root.ekCert(eks()["P-256"].Public())
	for name, c := range map[string]struct {
		content []byte
		says    string
	}{
		"empty":           {nil, "no whole PEM block"},
		"text":            {[]byte("hello"), "want a CA certificate in PEM or DER"},
		"cut PEM":         {whole[:len(whole)-10], "no whole PEM block"},
		"cut second PEM":  {append(bytes.Clone(whole), whole[:50]...), "last PEM block is not whole"},
		"cut DER":         {root.der[:100], "want a CA certificate"},
		"two DERs":        {append(bytes.Clone(root.der), root.der...), "want a CA certificate"},
		"a key":           {append(bytes.Clone(whole), []byte(strings.ReplaceAll(string(whole), "CERTIFICATE", "PRIVATE KEY"))...), `PEM block 2 is a "PRIVATE KEY"`},
		"an EK's":         {asPEM(root.der, server), "PEM block 2: "},
		"not a CA":        {server, "is no CA"},
		"garbage in PEM":  {asPEM([]byte{1, 2, 3}), "PEM block 1: "},
		"a large file":    {make([]byte, ekcert.MaxFile+1), "larger than 4194304 bytes"},
		"PKCS #7, as DER": {[]byte{0x30, 0x0b, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 7, 2}, "want a CA certificate"},
	} {
		_, err := ekcert.LoadBundle(fstest.MapFS{"good.pem": {Data: whole}, "dir/bad.crt": {Data: c.content}})
		if err == nil || !strings.Contains(err.Error(), "dir/bad.crt: ") || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
	for name, fsys := range map[string]fstest.MapFS{
		"nothing":            {},
		"only intermediates": {"a.pem": {Data: asPEM(root.newCA("a").der)}},
	} {
		if _, err := ekcert.LoadBundle(fsys); err == nil || !strings.Contains(err.Error(), "no self-signed CA certificate") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLoadBundleNamesAll: all files that fail are named, up to a limit.
func TestLoadBundleNamesAll(t *testing.T) {
	fsys := fstest.MapFS{}
	for i := range 25 {
		fsys[fmt.Sprintf("bad%02d.pem", i)] = &fstest.MapFile{Data: []byte("x")}
	}
	_, err := ekcert.LoadBundle(fsys)
	for _, s := range []string{"bad00.pem: ", "bad19.pem: ", "and 5 more"} {
		if err == nil || !strings.Contains(err.Error(), s) {
			t.Errorf("%v, want %q", err, s)
		}
	}
}

// TestBundleLimits: neither very many certificates nor very many files are read.
func TestBundleLimits(t *testing.T) {
	root := (*ca)(nil).newCA("root")
	two := fstest.MapFS{"root.pem": {Data: asPEM(root.der)}}
	another := root.newCA("another").der
	for i, name := range []string{"a.pem", "b.pem"} {
		var ders [][]byte
		for n := range ekcert.MaxCertificates / 2 {
			der := bytes.Clone(another) // with another signature, which nobody looks at here
			copy(der[len(der)-3:], []byte{byte(i), byte(n >> 8), byte(n)})
			ders = append(ders, der)
		}
		two[name] = &fstest.MapFile{Data: asPEM(ders...)}
	}
	if _, err := ekcert.LoadBundle(two); err == nil || !strings.Contains(err.Error(), "more than 4096 certificates") {
		t.Errorf("%v", err)
	}
	many := fstest.MapFS{"root.pem": {Data: asPEM(root.der)}}
	for i := range 17000 {
		many[fmt.Sprintf("d/%d", i)] = &fstest.MapFile{}
	}
	if _, err := ekcert.LoadBundle(many); err == nil || !strings.Contains(err.Error(), "more than 16384 files") {
		t.Errorf("%v", err)
	}
}

func FuzzLoadBundle(f *testing.F) {
	root := (*ca)(nil).newCA("root")
	f.Add(root.der)
	f.Add(asPEM(root.der, root.newCA("a").der))
	f.Add(root.forge(root.der, negative))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		b, err := ekcert.LoadBundle(fstest.MapFS{"a.pem": {Data: content}})
		if err == nil && b.Roots() == 0 {
			t.Fatal("a bundle without a root")
		}
	})
}
