package kubernetes

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// softHSM is the module of SoftHSM 2.
const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// oneToken is held while softhsm2-util makes a token: it fails if another process makes
// one at the same time.
var oneToken sync.Mutex

// newToken makes a token in SoftHSM with an AES key, and returns kleidi's settings for
// it. All tokens are in one folder, which TestMain sets in SOFTHSM2_CONF.
func newToken(t *testing.T) string {
	t.Helper()
	oneToken.Lock()
	defer oneToken.Unlock()
	label, pin := "kleidi-"+rand.Text()[:8], rand.Text()[:16]
	run(t, "softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", rand.Text()[:16], "--pin", pin)
	run(t, "pkcs11-tool", "--module", softHSM, "--token-label", label, "--login", "--pin", pin, "--keygen", "--key-type", "AES:32", "--label", "kek")
	file := filepath.Join(t.TempDir(), "pin")
	writeFile(t, file, []byte(pin+"\n"))
	return fmt.Sprintf("pkcs11: {module: %s, uri: %q, pinFile: %s}", softHSM, "pkcs11:token="+label+";object=kek", file)
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

func writeFile(t *testing.T, file string, b []byte) {
	t.Helper()
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// prepareSoftHSM makes the folder of all tokens.
func prepareSoftHSM(dir string) error {
	tokens, config := filepath.Join(dir, "tokens"), filepath.Join(dir, "softhsm2.conf")
	if err := os.Mkdir(tokens, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(config, []byte("directories.tokendir = "+tokens+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o600); err != nil {
		return err
	}
	return os.Setenv("SOFTHSM2_CONF", config)
}

// buildPKCS11 builds kleidi with PKCS#11, once; the pure-Go binary lacks it.
var buildPKCS11 = sync.OnceValues(func() (string, error) {
	binary := filepath.Join(scratch, "kleidi-pkcs11")
	build := exec.Command("go", "build", "-o", binary, "./cmd/kleidi")
	build.Dir = "../.."
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return binary, nil
})

func withPKCS11(t *testing.T) string {
	t.Helper()
	binary, err := buildPKCS11()
	if err != nil {
		t.Fatal(err)
	}
	return binary
}

// vault is a real Vault, with a minimal client to set it up.
type vault struct {
	url, token string
	client     *http.Client
}

// startVault runs Vault with the Transit key "kleidi", and returns kleidi's settings
// for it.
func startVault(t *testing.T) string {
	t.Helper()
	dir, port := t.TempDir(), node.FreePort(t)
	certificate := issue(t, filepath.Join(dir, "server"))
	server := node.Start(t, filepath.Join(dir, "vault.log"), binaries["vault"], "-addr", "127.0.0.1:"+port, "-dir", dir,
		"-tls-cert", filepath.Join(dir, "server.crt"), "-tls-key", filepath.Join(dir, "server.key"))
	roots := x509.NewCertPool()
	roots.AddCert(certificate)
	v := &vault{url: "https://127.0.0.1:" + port, client: &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}}
	node.Eventually(t, 2*time.Minute, "Vault answers", func() error {
		if err := server.Alive(); err != nil {
			t.Fatal(err)
		}
		token, err := os.ReadFile(filepath.Join(dir, "root-token"))
		v.token = string(token)
		if err == nil {
			_, err = v.call(http.MethodGet, "sys/mounts", nil)
		}
		return err
	})
	v.must(t, "sys/mounts/transit", map[string]any{"type": "transit"})
	v.must(t, "transit/keys/kleidi", map[string]any{})
	v.must(t, "sys/policies/acl/kleidi", map[string]any{"policy": `path "transit/+/kleidi" { capabilities = ["read", "update"] }`})
	var made struct {
		Auth struct {
			ClientToken string `json:"client_token"`
		}
	}
	answer := v.must(t, "auth/token/create", map[string]any{"policies": []string{"kleidi"}, "period": "24h"})
	if err := json.Unmarshal(answer, &made); err != nil || made.Auth.ClientToken == "" {
		t.Fatalf("Vault makes no token: %s (%v)", answer, err)
	}
	writeFile(t, filepath.Join(dir, "token"), []byte(made.Auth.ClientToken))
	return fmt.Sprintf("vault: {address: %q, caFile: %s, key: kleidi, auth: {method: token, tokenFile: %s}}",
		v.url, filepath.Join(dir, "server.crt"), filepath.Join(dir, "token"))
}

func (v *vault) must(t *testing.T, path string, data map[string]any) []byte {
	t.Helper()
	b, err := v.call(http.MethodPost, path, data)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (v *vault) call(method, path string, data map[string]any) ([]byte, error) {
	body, err := json.Marshal(data)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequest(method, v.url+"/v1/"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("X-Vault-Token", v.token)
	res, err := v.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode >= 300 {
		err = fmt.Errorf("%s: %s: %s", path, res.Status, answer)
	}
	return answer, err
}

// issue writes FILE.crt and FILE.key for 127.0.0.1, self-signed.
func issue(t *testing.T, file string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "vault"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, file+".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	writeFile(t, file+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return certificate
}
