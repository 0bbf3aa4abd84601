package vault

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// newFakeOfAnotherCA returns a file with the certificate of a CA that has issued no
// server's certificate.
func newFakeOfAnotherCA(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "another"}, IsCA: true,
		BasicConstraintsValid: true, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "another.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func sound() Config {
	return Config{Address: "https://vault.example:8200", Key: "kleidi", Auth: Auth{Method: MethodToken, TokenFile: "/t"}}
}

func TestConfig(t *testing.T) {
	for name, row := range map[string]struct {
		change func(c *Config)
		says   string // empty: it is right
	}{
		"least":         {func(*Config) {}, ""},
		"nested mounts": {func(c *Config) { c.Mount, c.Namespace, c.Auth.Mount = "/team/transit/", "admin/team/", "auth.d/token" }, ""},
		"approle": {func(c *Config) {
			c.Auth = Auth{Method: MethodAppRole, RoleID: "r", SecretIDFile: "/s", SecretIDWrapped: true}
		}, ""},
		"kubernetes":            {func(c *Config) { c.Auth = Auth{Method: MethodKubernetes, Role: "r"} }, ""},
		"cert":                  {func(c *Config) { c.Auth = Auth{Method: MethodCert, CertFile: "/c", KeyFile: "/k"} }, ""},
		"cert by the caller":    {func(c *Config) { c.Auth = Auth{Method: MethodCert, ClientCertificate: noCertificate} }, ""},
		"an IPv6 address":       {func(c *Config) { c.Address = "https://[::1]:8200/" }, ""},
		"no address":            {func(c *Config) { c.Address = "" }, "vault.address: it is missing"},
		"http":                  {func(c *Config) { c.Address = "http://127.0.0.1:8200" }, "only https is allowed"},
		"a socket":              {func(c *Config) { c.Address = "unix:///run/vault.sock" }, "only https is allowed"},
		"no scheme":             {func(c *Config) { c.Address = "vault.example:8200" }, "only https is allowed"},
		"no host":               {func(c *Config) { c.Address = "https://:8200" }, "names no host"},
		"a password":            {func(c *Config) { c.Address = "https://u:hunter2@vault.example" }, "holds a user or a password"},
		"a path":                {func(c *Config) { c.Address = "https://vault.example/v1" }, "more than a host and a port"},
		"a query":               {func(c *Config) { c.Address = "https://vault.example/?a" }, "more than a host and a port"},
		"no URL":                {func(c *Config) { c.Address = "https://vault.example:x" }, "not a URL"},
		"no key":                {func(c *Config) { c.Key = "" }, "vault.key"},
		"a key with a path":     {func(c *Config) { c.Key = "../sys/seal" }, "vault.key"},
		"a mount that climbs":   {func(c *Config) { c.Mount = "transit/../sys" }, "vault.mount"},
		"a namespace with more": {func(c *Config) { c.Namespace = "a?b" }, "vault.namespace"},
		"an auth mount":         {func(c *Config) { c.Auth.Mount = "a//b" }, "vault.auth.mount"},
		"a relative CA":         {func(c *Config) { c.CAFile = "ca.pem" }, "vault.caFile"},
		"hasty":                 {func(c *Config) { c.Timeout = time.Millisecond }, "vault.timeout"},
		"endless":               {func(c *Config) { c.Timeout = time.Hour }, "vault.timeout"},
		"no method":             {func(c *Config) { c.Auth = Auth{} }, "vault.auth.method"},
		"no token file":         {func(c *Config) { c.Auth.TokenFile = "" }, "vault.auth.tokenFile: it is missing"},
		"a relative file":       {func(c *Config) { c.Auth.TokenFile = "t" }, "vault.auth.tokenFile"},
		"what is not used":      {func(c *Config) { c.Auth.RoleID = "r" }, "vault.auth.roleID: the method token doesn't use it"},
		"wrapped what":          {func(c *Config) { c.Auth.SecretIDWrapped = true }, "vault.auth.secretIDWrapped"},
		"two certificates": {func(c *Config) {
			c.Auth = Auth{Method: MethodCert, CertFile: "/c", KeyFile: "/k", ClientCertificate: noCertificate}
		}, "vault.auth.keyFile: the method cert doesn't use it"},
	} {
		t.Run(name, func(t *testing.T) {
			c := sound()
			row.change(&c)
			_, err := New(c)
			switch {
			case row.says == "" && err != nil:
				t.Error(err)
			case row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)):
				t.Errorf("%v does not say %q", err, row.says)
			case err != nil && strings.Contains(err.Error(), "hunter2"):
				t.Errorf("the error holds a password: %v", err)
			}
		})
	}
}

func noCertificate(context.Context) (*tls.Certificate, error) { return nil, nil }

// TestAllProblemsAtOnce: the error names every setting that is wrong.
func TestAllProblemsAtOnce(t *testing.T) {
	_, err := New(Config{Address: "http://a", Key: "/", Timeout: 1, Auth: Auth{Method: MethodAppRole}})
	for _, setting := range []string{"vault.address", "vault.key", "vault.timeout", "vault.auth.roleID", "vault.auth.secretIDFile"} {
		if err == nil || !strings.Contains(err.Error(), setting) {
			t.Errorf("%v does not name %s", err, setting)
		}
	}
}

// TestObject: encoding/json decodes the bodies that object encodes.
func TestObject(t *testing.T) {
	value := `a"b\c/d{}<>&'` + "`~"
	var got map[string]string
	b := object(field{"one", []byte(value), true}, field{"two", []byte("2"), false})
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	if got["one"] != value || got["two"] != "2" || len(got) != 2 {
		t.Errorf("%q", got)
	}
	if cap(b) != 2+len("one")+2*len(value)+6+len("two")+2*1+6 {
		t.Errorf("the buffer has grown to %d bytes, and left a copy", cap(b))
	}
	if string(object()) != "{}" {
		t.Errorf("%s", object())
	}
}
