package verifierd

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/ownership"
	"github.com/beezy-dev/kleidi/internal/strictyaml"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
	"github.com/beezy-dev/kleidi/tpm/ekcert"
)

// DefaultPath is read if no other configuration is named.
const DefaultPath = "/etc/kleidi/verifier/verifier.yaml"

const kind = "VerifierConfiguration"

const maxConfig = 1 << 20

const maxNodeName = 253

// Config is the configuration file of kleidi verifier.
type Config struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string `yaml:"kind"`
	// ClusterID is the cluster whose nodes are verified.
	ClusterID seal.ClusterID `yaml:"clusterID" want:"32 lower-case hexadecimal digits, as kleidi status shows them"`
	Listen    string         `yaml:"listen"`
	// Certificate and Key are the files for TLS, in PEM. The nodes' TPMs demand
	// signatures by SigningKey. Both keys must have mode 0600.
	Certificate string `yaml:"certificate"`
	Key         string `yaml:"key"`
	SigningKey  string `yaml:"signingKey"`
	// FormerSigningKeys are earlier keys that some nodes' slots still demand.
	FormerSigningKeys []string `yaml:"formerSigningKeys"`
	Audit             Audit    `yaml:"audit"`
	// EKCertificates demands a certificate of every TPM, issued by one of these CAs, in
	// addition to the registered digest.
	EKCertificates CAs `yaml:"ekCertificates"`
	// HTTP is where health and metrics answer.
	HTTP  config.HTTP `yaml:"http"`
	Log   config.Log  `yaml:"log"`
	Nodes []Node      `yaml:"nodes"`

	path string
}

// File returns the path of the configuration.
func (c *Config) File() string { return c.path }

func (c *Config) validate(p *strictyaml.Problems) {
	if c.APIVersion != config.APIVersion {
		p.Add("apiVersion", "%q; want %s", c.APIVersion, config.APIVersion)
	}
	if c.Kind != kind {
		p.Add("kind", "%q; want %s", c.Kind, kind)
	}
	if c.ClusterID == (seal.ClusterID{}) {
		p.Add("clusterID", "none is named; kleidi status on a node shows it")
	}
	if _, port, err := net.SplitHostPort(c.Listen); err != nil {
		p.Add("listen", "%v; want 0.0.0.0:9781 for instance", err)
	} else if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		p.Add("listen", "port %q; want 1 to 65535", port)
	}
	for path, value := range map[string]string{"certificate": c.Certificate, "key": c.Key, "signingKey": c.SigningKey, "audit.file": c.Audit.File} {
		absolutePath(p, path, value)
	}
	if c.EKCertificates.Folder != "" {
		absolutePath(p, "ekCertificates.folder", c.EKCertificates.Folder)
	}
	for i, path := range c.FormerSigningKeys {
		absolutePath(p, fmt.Sprintf("formerSigningKeys[%d]", i), path)
	}
	if c.Key == c.SigningKey || slices.Contains(c.FormerSigningKeys, c.Key) {
		p.Add("signingKey", "it is the key of TLS too; name another")
	}
	if c.Log.Format != "text" && c.Log.Format != "json" {
		p.Add("log.format", "%q; want text or json", c.Log.Format)
	}
	c.HTTP.Validate(p)
	c.validateNodes(p)
}

func (c *Config) validateNodes(p *strictyaml.Problems) {
	names, keys := map[string]bool{}, map[string]bool{}
	for i, n := range c.Nodes {
		path := fmt.Sprintf("nodes[%d].", i)
		if n.Name == "" || len(n.Name) > maxNodeName {
			p.Add(path+"name", "it has %d bytes, want 1 to %d", len(n.Name), maxNodeName)
		}
		if names[n.Name] {
			p.Add(path+"name", "%q is registered twice", n.Name)
		}
		if keys[n.EK] {
			p.Add(path+"ek", "it is another node's too")
		}
		names[n.Name], keys[n.EK] = true, true
		digest, ok := strings.CutPrefix(n.EK, "sha256:")
		if b, err := hex.DecodeString(digest); !ok || err != nil || len(b) != 32 || digest != strings.ToLower(digest) {
			p.Add(path+"ek", "%.80q is not a digest; want sha256: and 64 lower-case hexadecimal digits, as kleidi keyring show prints them", n.EK)
		}
		absolutePath(p, path+"bootPolicy", n.BootPolicy)
	}
}

// tls reads the server's certificate.
func (c *Config) tls() (*tls.Certificate, error) {
	chain, err := files.ReadOwned(c.Certificate, files.MaxPrivateKey)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	key, err := files.ReadPrivateKey(c.Key)
	if err != nil {
		return nil, fmt.Errorf("key: %w", err)
	}
	defer clear(key)
	certificate, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, fmt.Errorf("certificate %s with key %s: %w", c.Certificate, c.Key, err)
	}
	return &certificate, nil
}

// keys reads the signing keys, the current one first.
func (c *Config) keys() ([]*remote.Key, error) {
	current, err := readSigningKey(c.SigningKey)
	if err != nil {
		return nil, fmt.Errorf("signingKey: %w", err)
	}
	keys := []*remote.Key{current}
	for i, path := range c.FormerSigningKeys {
		former, err := readSigningKey(path)
		if err != nil {
			return nil, fmt.Errorf("formerSigningKeys[%d]: %w", i, err)
		}
		keys = append(keys, former)
	}
	return keys, nil
}

// endorsements returns the check of EK certificates, or nil if none is demanded.
func (c *Config) endorsements() (func(certificate, spki []byte) error, error) {
	if c.EKCertificates.Folder == "" {
		return nil, nil
	}
	if err := ownership.CheckFolder(c.EKCertificates.Folder); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("ekCertificates.folder: %w", err)
	}
	bundle, err := ekcert.LoadBundle(os.DirFS(c.EKCertificates.Folder))
	if err != nil {
		return nil, fmt.Errorf("ekCertificates.folder %s: %w", c.EKCertificates.Folder, err)
	}
	return func(certificate, spki []byte) error {
		if len(certificate) == 0 {
			return errors.New("the TPM holds no certificate of its endorsement key")
		}
		key, err := x509.ParsePKIXPublicKey(spki)
		if err != nil {
			return err
		}
		_, err = bundle.Verify(certificate, key, time.Now())
		return err
	}, nil
}

// Audit says where to record verdicts.
type Audit struct {
	File string `yaml:"file"`
}

// CAs is a folder of manufacturers' CA certificates; see package tpm/ekcert.
type CAs struct {
	Folder string `yaml:"folder"`
}

// Node is a registered node: the digest of its endorsement key, and the file of its boot
// policy.
type Node struct {
	Name       string `yaml:"name" json:"name"`
	EK         string `yaml:"ek" json:"ek"`
	BootPolicy string `yaml:"bootPolicy" json:"bootPolicy"` // file
}

// Load reads the configuration file, which nobody but root and this user may change.
func Load(path string) (*Config, error) {
	b, err := files.ReadOwned(path, maxConfig)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("verifier configuration: %w; make one with kleidi verifier init --cluster-id ID --name HOST, or name it with --config", err)
	}
	if err != nil {
		return nil, files.HintRoot(fmt.Errorf("verifier configuration: %w", err))
	}
	c, err := parse(b)
	if err != nil {
		return nil, fmt.Errorf("verifier configuration %s:\n%w", path, err)
	}
	c.path = path
	return c, nil
}

// parse reports every problem at once, one line for each.
func parse(b []byte) (*Config, error) {
	if len(b) > maxConfig {
		return nil, fmt.Errorf("  file: more than %d bytes", maxConfig)
	}
	c := &Config{Log: config.Log{Level: slog.LevelInfo, Format: "text"}, HTTP: config.HTTP{Socket: DefaultSocket, SocketMode: 0o600, SocketGID: -1}}
	p := &strictyaml.Problems{}
	if err := strictyaml.Decode(b, c, p); err != nil {
		return nil, err
	}
	c.validate(p)
	return c, p.Err()
}

func absolutePath(p *strictyaml.Problems, path, value string) {
	if !filepath.IsAbs(value) {
		p.Add(path, "%q is not an absolute path", value)
	}
}

func readSigningKey(path string) (*remote.Key, error) {
	b, err := files.ReadPrivateKey(path)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	signer, err := bootstate.ParsePrivateKey(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	key, err := remote.NewKey(signer)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return key, nil
}

func publicPEM(key *remote.Key) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

// privatePEM returns PKCS #8 in PEM. The caller clears it.
func privatePEM(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// DefaultSocket is the socket for health and metrics. The folder is the verifier's own:
// on a machine that runs both, kleidi serve has another one.
const DefaultSocket = "/run/kleidi-verifier/http.sock"
