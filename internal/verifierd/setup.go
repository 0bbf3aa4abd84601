package verifierd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/seal"
)

// Setup holds the arguments of kleidi verifier init.
type Setup struct {
	Dir     string
	Cluster string
	Name    string
	Listen  string
}

// Make writes the keys, the certificate and the configuration. It replaces no file.
func (s *Setup) Make() (*Config, error) {
	cluster, err := seal.ParseClusterID(s.Cluster)
	if err != nil {
		return nil, fmt.Errorf("--cluster-id: %w; kleidi status on a node shows it", err)
	}
	if s.Dir, err = filepath.Abs(s.Dir); err != nil {
		return nil, err
	}
	in := func(name string) string { return filepath.Join(s.Dir, name) }
	c := &Config{APIVersion: config.APIVersion, Kind: kind, ClusterID: cluster, Listen: s.Listen,
		Certificate: in("tls.crt"), Key: in("tls.key"), SigningKey: in("signing.key"), Audit: Audit{in("audit.log")}, path: in("verifier.yaml")}
	document, err := yaml.Marshal(map[string]any{"apiVersion": c.APIVersion, "kind": c.Kind, "clusterID": s.Cluster, "listen": c.Listen, "certificate": c.Certificate,
		"key": c.Key, "signingKey": c.SigningKey, "audit": map[string]any{"file": c.Audit.File}, "nodes": []any{}})
	if err != nil {
		return nil, err
	}
	if _, err := parse(document); err != nil {
		return nil, fmt.Errorf("the configuration would not be valid:\n%w", err)
	}
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return nil, err
	}
	for _, path := range []string{c.Certificate, c.Key, c.SigningKey, c.path} {
		if _, err := os.Lstat(path); err == nil {
			return nil, fmt.Errorf("%s exists; name another folder with --dir, or move it away", path)
		}
	}
	if err := s.writeKeys(c); err != nil {
		return nil, err
	}
	return c, files.WriteNew(c.path, document)
}

func (s *Setup) writeKeys(c *Config) error {
	for _, path := range []string{c.Key, c.SigningKey} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		b, err := privatePEM(key)
		if err != nil {
			return err
		}
		err = files.WriteNew(path, b)
		clear(b)
		if err != nil {
			return err
		}
		if path == c.SigningKey {
			continue
		}
		certificate, err := s.certificate(key)
		if err != nil {
			return err
		}
		if err := files.WriteNew(c.Certificate, certificate); err != nil {
			return err
		}
	}
	return nil
}

// certificate returns a self-signed certificate, in PEM.
func (s *Setup) certificate(key *ecdsa.PrivateKey) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: "kleidi verifier"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(validity),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true}
	if ip := net.ParseIP(s.Name); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{s.Name}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("certificate for %.80q: %w", s.Name, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// validity is long, because nodes recognise the certificate by its digest.
const validity = 10 * 365 * 24 * time.Hour
