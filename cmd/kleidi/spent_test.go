package main

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// wrappingVault answers like a Vault that is asked with a wrapping token: it opens each
// token once. Its Transit key encrypts nothing.
func wrappingVault(t *testing.T) *httptest.Server {
	t.Helper()
	var spent atomic.Pointer[string]
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body map[string]string
		_ = json.NewDecoder(r.Body).Decode(&body)
		w.Header().Set("Content-Type", "application/json")
		switch token := r.Header.Get("X-Vault-Token"); r.URL.Path {
		case "/v1/sys/wrapping/lookup":
			if last := spent.Load(); last != nil && *last == body["token"] {
				w.WriteHeader(http.StatusBadRequest)
				fmt.Fprint(w, `{"errors":["wrapping token is not valid or does not exist"]}`)
				return
			}
			fmt.Fprint(w, `{"data":{"creation_path":"auth/approle/role/kleidi/secret-id"}}`)
		case "/v1/sys/wrapping/unwrap":
			spent.Store(&token)
			fmt.Fprint(w, `{"data":{"secret_id":"secret-id"}}`)
		case "/v1/auth/approle/login":
			fmt.Fprint(w, `{"auth":{"client_token":"hvs.token"}}`)
		case "/v1/transit/encrypt/kleidi":
			fmt.Fprintf(w, `{"data":{"ciphertext":"vault:v1:%s"}}`, base64.StdEncoding.EncodeToString([]byte(body["plaintext"])))
		case "/v1/transit/decrypt/kleidi":
			plain, _ := base64.StdEncoding.DecodeString(strings.TrimPrefix(body["ciphertext"], "vault:v1:"))
			fmt.Fprintf(w, `{"data":{"plaintext":"%s"}}`, plain)
		case "/v1/auth/token/revoke-self":
			w.WriteHeader(http.StatusNoContent)
		default:
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"errors":[]}`)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

// TestSpentWrappingToken: a command that unwraps a secret ID without serve says that
// serve needs another wrapping token. The next command with the same token says so too.
func TestSpentWrappingToken(t *testing.T) {
	server := wrappingVault(t)
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) {
		if err := os.WriteFile(path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})))
	write("config.yaml", fmt.Sprintf(`apiVersion: kleidi.beezy.dev/v1alpha1
kind: KleidiConfiguration
node: cp-1
state: {dir: %[1]s/state}
admin: {socket: %[1]s/admin.sock}
unlock: {order: [vault], requireAttestation: false}
vault:
  address: %[2]s
  caFile: %[1]s/ca.pem
  key: kleidi
  auth: {method: approle, roleID: role, secretIDFile: %[1]s/secret-id, secretIDWrapped: true}
`, dir, server.URL))
	run := func(args ...string) (string, error) {
		out, err := exec.Command(binary, append([]string{"--config", path("config.yaml")}, args...)...).CombinedOutput()
		if strings.Contains(string(out), "hvs.") {
			t.Errorf("kleidi %v shows a token: %s", args, out)
		}
		return string(out), err
	}
	note := "note: the wrapping token in vault.auth.secretIDFile is spent"
	write("secret-id", "hvs.first")
	if out, err := run("init", "--no-recovery", "--accept-data-loss"); err != nil || !strings.Contains(out, note) || !strings.Contains(out, "put a new wrapping token into "+path("secret-id")+" before kleidi serve starts") {
		t.Fatalf("init: %v\n%s", err, out)
	}
	if out, err := run("slot", "test"); err == nil || strings.Contains(out, note) || !strings.Contains(out, "put a new wrapping token there") {
		t.Errorf("slot test with a spent token: %v\n%s", err, out)
	}
	write("secret-id", "hvs.second")
	if out, err := run("slot", "test"); err != nil || !strings.Contains(out, note) {
		t.Errorf("slot test: %v\n%s", err, out)
	}
}
