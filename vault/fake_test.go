package vault

import (
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// fake is a server that answers like Vault. It serves for faults that a real Vault can't be
// made to show; e2e/vault has a real one. Its Transit "encrypts" with base64.
type fake struct {
	*httptest.Server
	t *testing.T

	mu       sync.Mutex
	requests []*http.Request
	// before may answer a request in the place of the fake, and reports whether it did.
	// n counts the requests for that path, from 1.
	before func(w http.ResponseWriter, r *http.Request, n int) bool
	counts map[string]int
}

func newFake(t *testing.T, before func(w http.ResponseWriter, r *http.Request, n int) bool) *fake {
	t.Helper()
	f := &fake{t: t, before: before, counts: map[string]int{}}
	f.Server = httptest.NewUnstartedServer(f)
	f.Config.ErrorLog = log.New(io.Discard, "", 0)
	f.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	f.StartTLS()
	t.Cleanup(f.Close)
	return f
}

const (
	fakeToken    = "hvs.token-of-the-fake"
	fakeRoleID   = "role"
	fakeSecretID = `secret "id" with \`
)

// ServeHTTP implements http.Handler.
func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.requests = append(f.requests, r)
	f.counts[r.URL.Path]++
	n := f.counts[r.URL.Path]
	f.mu.Unlock()
	if f.before != nil && f.before(w, r, n) {
		return
	}
	var body map[string]string
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		answer(w, http.StatusBadRequest, `{"errors":["no JSON"]}`)
		return
	}
	switch operation := strings.TrimPrefix(r.URL.Path, "/v1/"); operation {
	case "auth/approle/login":
		answer(w, http.StatusOK, `{"auth":{"client_token":"`+fakeToken+`"}}`)
	case "transit/encrypt/kleidi":
		answer(w, http.StatusOK, `{"data":{"ciphertext":"vault:v1:`+base64.StdEncoding.EncodeToString([]byte(body["plaintext"]))+`"}}`)
	case "transit/decrypt/kleidi":
		plain, _ := base64.StdEncoding.DecodeString(strings.TrimPrefix(body["ciphertext"], "vault:v1:"))
		answer(w, http.StatusOK, `{"data":{"plaintext":"`+string(plain)+`"}}`)
	case "auth/token/revoke-self":
		w.WriteHeader(http.StatusNoContent)
	default:
		answer(w, http.StatusNotFound, `{"errors":[]}`)
	}
}

func answer(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, body)
}

// config returns a configuration that logs in by AppRole.
func (f *fake) config() Config {
	f.t.Helper()
	dir := f.t.TempDir()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw})
	for name, b := range map[string][]byte{"ca.pem": ca, "secret-id": []byte(strings.ReplaceAll(fakeSecretID, " ", "_") + "\n")} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			f.t.Fatal(err)
		}
	}
	return Config{Address: f.URL, Key: "kleidi", CAFile: filepath.Join(dir, "ca.pem"), Timeout: 30 * time.Second,
		Auth: Auth{Method: MethodAppRole, RoleID: fakeRoleID, SecretIDFile: filepath.Join(dir, "secret-id")}}
}

func newWrapper(t *testing.T, c Config) *Wrapper {
	t.Helper()
	w, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

func newKEK(t *testing.T) *seal.Secret {
	t.Helper()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kek.Close() })
	return kek
}

// sent returns the bodies that were sent to a path.
func (f *fake) sent(path string) (all []*http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.requests {
		if r.URL.Path == "/v1/"+path {
			all = append(all, r)
		}
	}
	return all
}

func checkError(t *testing.T, err error, cause seal.Cause, is error, says ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("it succeeds")
	}
	if got := seal.CauseOf(err); got != cause {
		t.Errorf("cause %q, want %q: %v", got, cause, err)
	}
	if _, hint := seal.SplitHint(err); hint == "" {
		t.Errorf("no hint: %v", err)
	}
	if is != nil && !isError(err, is) {
		t.Errorf("%v is not %q", err, is)
	}
	for _, text := range says {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%v does not say %q", err, text)
		}
	}
	if len(err.Error()) > 1000 {
		t.Errorf("the error has %d bytes: %.200s", len(err.Error()), err)
	}
	if text := fmt.Sprintf("%+v", err); strings.Contains(text, fakeToken) || strings.Contains(text, "secret_") {
		t.Errorf("the error holds a credential: %s", text)
	}
}
