package vault

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/vault"
)

// serverName is a name in the server's certificate, in addition to its address.
const serverName = "vault.test"

// server is a real Vault with a Transit key, and a client of it with all rights.
type server struct {
	*node.Process
	t    *testing.T
	dir  string
	url  string
	ca   *authority
	args []string
	root *api.Client
	// Results of the auth methods' set-up that tests use.
	roleID    string
	jwtKey    *ecdsa.PrivateKey
	apiserver *apiserver
}

// newServer starts a Vault with the Transit key "kleidi" and the rules of docs/vault.md.
func newServer(t *testing.T, args ...string) *server {
	t.Helper()
	s := startServer(t, args...)
	s.must("sys/mounts/transit", map[string]any{"type": "transit"})
	s.must("transit/keys/kleidi", map[string]any{})
	s.must("sys/policies/acl/kleidi", map[string]any{"policy": documentedRules(t)})
	return s
}

// startServer starts an empty Vault.
func startServer(t *testing.T, args ...string) *server {
	t.Helper()
	port := node.FreePort(t)
	s := &server{t: t, dir: t.TempDir(), url: "https://127.0.0.1:" + port, ca: newAuthority(t)}
	s.write("ca.pem", s.ca.pem)
	s.ca.issue(t, s.path("server"), serverName)
	s.args = append([]string{"-addr", "127.0.0.1:" + port, "-dir", s.dir,
		"-tls-cert", s.path("server.crt"), "-tls-key", s.path("server.key")}, args...)
	s.start()
	return s
}

// start runs the server and waits until it is unsealed.
func (s *server) start() {
	s.t.Helper()
	s.Process = node.Start(s.t, s.path("vault.log"), binaries["vault"], s.args...)
	node.Eventually(s.t, 5*time.Minute, "Vault answers", func() error {
		if err := s.Alive(); err != nil {
			s.t.Fatal(err)
		}
		token, err := os.ReadFile(s.path("root-token"))
		if err != nil {
			return err
		}
		if s.root == nil {
			s.root = s.client("")
		}
		s.root.SetToken(string(token)) // a moment ago the file may have been incomplete
		_, err = s.root.Logical().ReadWithContext(s.t.Context(), "sys/mounts")
		return err
	})
}

// client is the library's own client, set up without this project's code.
func (s *server) client(token string) *api.Client {
	s.t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.ca.pem)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}
	c, err := api.NewClient(&api.Config{Address: s.url, HttpClient: &http.Client{Transport: transport}})
	if err != nil {
		s.t.Fatal(err)
	}
	c.SetToken(token)
	return c
}

// must writes as root.
func (s *server) must(path string, data map[string]any) *api.Secret {
	s.t.Helper()
	secret, err := s.root.Logical().WriteWithContext(s.t.Context(), path, data)
	if err != nil {
		s.t.Fatalf("%s: %v", path, err)
	}
	return secret
}

func (s *server) path(name string) string { return filepath.Join(s.dir, name) }

// write writes a file that only its owner may read, and returns its path.
func (s *server) write(name string, b []byte) string {
	s.t.Helper()
	if err := os.WriteFile(s.path(name), b, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return s.path(name)
}

// remove deletes as root.
func (s *server) remove(path string) {
	s.t.Helper()
	if _, err := s.root.Logical().DeleteWithContext(s.t.Context(), path); err != nil {
		s.t.Fatalf("%s: %v", path, err)
	}
}

func (s *server) removeFile(name string) {
	s.t.Helper()
	if err := os.Remove(s.path(name)); err != nil {
		s.t.Fatal(err)
	}
}

func (s *server) copy(from, to string) {
	s.t.Helper()
	b, err := os.ReadFile(s.path(from))
	if err != nil {
		s.t.Fatal(err)
	}
	s.write(to, b)
}

// config is a complete configuration except for Auth.
func (s *server) config() vault.Config {
	return vault.Config{Address: s.url, Key: "kleidi", CAFile: s.path("ca.pem"), Timeout: time.Minute}
}

// wrapper makes a wrapper from a configuration that must be valid.
func (s *server) wrapper(c vault.Config) *vault.Wrapper {
	s.t.Helper()
	w, err := vault.New(c)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { w.Close() })
	return w
}

// documentedRules returns the rules in docs/vault.md, unchanged.
func documentedRules(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../docs/vault.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(b), "```hcl\n")
	rules, _, closed := strings.Cut(rest, "```")
	if !found || !closed {
		t.Fatal("docs/vault.md shows no block of hcl")
	}
	return rules
}

// authority issues certificates.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	pem         []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{key: newKey(t)}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA " + rand.Text()}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.certificate, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// keyPEM is the authority's private key.
func (a *authority) keyPEM(t *testing.T) []byte {
	t.Helper()
	private, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})
}

// issue writes FILE.crt and FILE.key, for servers and clients alike.
func (a *authority) issue(t *testing.T, file, name string) *ecdsa.PrivateKey {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		DNSNames: []string{name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for suffix, block := range map[string]*pem.Block{".crt": {Type: "CERTIFICATE", Bytes: der}, ".key": {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(file+suffix, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return key
}

// field reads a string from an answer.
func field(t *testing.T, secret *api.Secret, name string) string {
	t.Helper()
	if secret == nil {
		t.Fatalf("no answer with %s", name)
	}
	s, ok := secret.Data[name].(string)
	if !ok {
		t.Fatalf("the answer has no %s: %s", name, fmt.Sprint(secret.Data))
	}
	return s
}
