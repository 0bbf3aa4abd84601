package ekcert

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Limits of a bundle.
const (
	// MaxFile bounds one file, in bytes.
	MaxFile = 4 << 20
	// MaxCertificates bounds all files together. The known certificates of TPM makers
	// are some hundreds.
	MaxCertificates = 4096
	maxEntries      = 16384 // files and folders
	maxProblems     = 20    // in a report
)

// Bundle holds the CA certificates that may vouch for EKs.
type Bundle struct {
	roots, intermediates       *x509.CertPool
	numRoots, numIntermediates int
	seen                       map[string]bool
}

var errFull = fmt.Errorf("more than %d certificates; keep those of the TPM makers that are in use", MaxCertificates)

// suffixes are the suffixes of the files that LoadBundle reads.
var suffixes = []string{".pem", ".crt", ".cer", ".der"}

// LoadBundle reads the CA certificates in a folder and in the folders below it: the
// files named *.pem, *.crt, *.cer or *.der, each with one certificate in DER or any
// number in PEM. Self-signed certificates are roots. LoadBundle skips other files,
// names that begin with a dot, and symbolic links to folders.
//
// A file that does not parse, or holds a certificate that is not a CA's, is an error
// that names the file. LoadBundle reports all such files at once and then returns no
// bundle: an operator would search in vain for a CA that is missing silently.
func LoadBundle(fsys fs.FS) (*Bundle, error) {
	b := &Bundle{roots: x509.NewCertPool(), intermediates: x509.NewCertPool(), seen: map[string]bool{}}
	var problems []error
	entries := 0
	err := fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		if entries++; entries > maxEntries {
			return fmt.Errorf("more than %d files and folders; name a folder that holds CA certificates only", maxEntries)
		}
		switch {
		case err != nil:
			return err
		case name != "." && strings.HasPrefix(d.Name(), "."):
			return skip(d)
		case d.IsDir() || !slices.Contains(suffixes, strings.ToLower(path.Ext(name))):
			return nil
		}
		switch err := b.addFile(fsys, name); {
		case errors.Is(err, errFull):
			return err
		case err != nil:
			problems = append(problems, fmt.Errorf("%s: %w", name, err))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("EK CA bundle: %w", err)
	}
	if err := join(problems); err != nil {
		return nil, fmt.Errorf("EK CA bundle: %w", err)
	}
	if b.numRoots == 0 {
		return nil, fmt.Errorf("EK CA bundle: no self-signed CA certificate in it (others: %d); add the root of each TPM maker, as *.pem, *.crt, *.cer or *.der", b.numIntermediates)
	}
	return b, nil
}

func skip(d fs.DirEntry) error {
	if d.IsDir() {
		return fs.SkipDir
	}
	return nil
}

func join(problems []error) error {
	if n := len(problems) - maxProblems; n > 0 {
		problems = append(problems[:maxProblems:maxProblems], fmt.Errorf("and %d more", n))
	}
	return errors.Join(problems...)
}

// Roots returns how many roots there are.
func (b *Bundle) Roots() int { return b.numRoots }

// Intermediates returns the number of CAs that are not roots.
func (b *Bundle) Intermediates() int { return b.numIntermediates }

func (b *Bundle) addFile(fsys fs.FS, name string) error {
	// Before the file is opened: opening a named pipe would wait for a writer. Kubernetes
	// makes links to folders beside a ConfigMap's files.
	if info, err := fs.Stat(fsys, name); err != nil {
		return err
	} else if !info.Mode().IsRegular() {
		if info.IsDir() {
			return nil
		}
		return errors.New("not a regular file; replace it by one")
	}
	f, err := fsys.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return err
	}
	if len(content) > MaxFile {
		return fmt.Errorf("larger than %d bytes; split it", MaxFile)
	}
	return b.addContent(content)
}

func (b *Bundle) addContent(content []byte) error {
	block, rest := pem.Decode(content)
	if block == nil {
		if bytes.Contains(content, []byte("-----BEGIN")) || len(content) == 0 {
			return errors.New("no whole PEM block in it; copy the certificate again")
		}
		return b.add(content)
	}
	for i := 1; block != nil; i++ {
		if block.Type != "CERTIFICATE" {
			return fmt.Errorf("PEM block %d is a %.40q, want CERTIFICATE; take it out", i, block.Type)
		}
		if err := b.add(block.Bytes); err != nil {
			return fmt.Errorf("PEM block %d: %w", i, err)
		}
		block, rest = pem.Decode(rest)
	}
	if bytes.Contains(rest, []byte("-----BEGIN")) {
		return errors.New("its last PEM block is not whole; copy the certificate again")
	}
	return nil
}

func (b *Bundle) add(der []byte) error {
	c, _, err := parse(der)
	if err != nil {
		return fmt.Errorf("%w; want a CA certificate in PEM or DER, remove the file otherwise", err)
	}
	switch {
	case !c.cert.IsCA || !c.cert.BasicConstraintsValid:
		return fmt.Errorf("%.200q is no CA; only CA certificates belong here, endorsement keys go by digest", c.cert.Subject.String())
	case b.seen[string(c.raw)]:
		return nil
	}
	if len(b.seen) == MaxCertificates {
		return errFull
	}
	b.seen[string(c.raw)] = true
	if selfSigned(c.cert) {
		b.roots.AddCert(c.cert)
		b.numRoots++
	} else {
		b.intermediates.AddCert(c.cert)
		b.numIntermediates++
	}
	return nil
}

// selfSigned recognises a root. A root's own signature proves nothing, so SHA-1 is
// acceptable there. But it distinguishes a root from a CA whose new key was signed by
// its old key.
func selfSigned(c *x509.Certificate) bool {
	if !bytes.Equal(c.RawSubject, c.RawIssuer) {
		return false
	}
	err := c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature)
	_, weak := errors.AsType[x509.InsecureAlgorithmError](err)
	return err == nil || weak
}
