package vault

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// clientPair returns a self-signed client certificate, and files with it and its key.
func clientPair(t *testing.T) (certificate *tls.Certificate, certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile = credential(t, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	keyFile = credential(t, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})))
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, certFile, keyFile
}

// credential returns a file of mode 0600 with this content.
func credential(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "credential")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// admits is a before that logs in at auth/METHOD/login whoever sends the wanted body, with
// the wanted client certificate or with none.
func admits(method string, body map[string]string, certificate []byte) func(http.ResponseWriter, *http.Request, int) bool {
	return func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if r.URL.Path != "/v1/auth/"+method+"/login" {
			return false
		}
		var sent map[string]string
		var shown []byte
		if c := r.TLS.PeerCertificates; len(c) > 0 {
			shown = c[0].Raw
		}
		if json.NewDecoder(r.Body).Decode(&sent) != nil || !maps.Equal(sent, body) || !bytes.Equal(shown, certificate) || r.Header.Get("X-Vault-Token") != "" {
			answer(w, http.StatusBadRequest, `{"errors":["unexpected login"]}`)
			return true
		}
		answer(w, http.StatusOK, `{"auth":{"client_token":"`+fakeToken+`"}}`)
		return true
	}
}

// TestLogins: each method sends its own credentials and nothing else. The requests after the
// login have its token, and a token that the login made is revoked at the end.
func TestLogins(t *testing.T) {
	pair, certFile, keyFile := clientPair(t)
	given := func(context.Context) (*tls.Certificate, error) { return pair, nil }
	for name, row := range map[string]struct {
		auth        Auth
		body        map[string]string
		certificate []byte
		token       string
	}{
		"token":      {Auth{Method: MethodToken, TokenFile: credential(t, "hvs.own\n")}, nil, nil, "hvs.own"},
		"kubernetes": {Auth{Method: MethodKubernetes, Role: "kms", JWTFile: credential(t, "a.b.c")}, map[string]string{"role": "kms", "jwt": "a.b.c"}, nil, fakeToken},
		"jwt":        {Auth{Method: MethodJWT, Role: "kms", JWTFile: credential(t, "a.b.c\n")}, map[string]string{"role": "kms", "jwt": "a.b.c"}, nil, fakeToken},
		"cert":       {Auth{Method: MethodCert, CertFile: certFile, KeyFile: keyFile}, map[string]string{}, pair.Certificate[0], fakeToken},
		"cert, role": {Auth{Method: MethodCert, CertFile: certFile, KeyFile: keyFile, Role: "kms"}, map[string]string{"name": "kms"}, pair.Certificate[0], fakeToken},
		"cert given": {Auth{Method: MethodCert, ClientCertificate: given}, map[string]string{}, pair.Certificate[0], fakeToken},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, admits(string(row.auth.Method), row.body, row.certificate))
			c := f.config()
			c.Auth = row.auth
			if _, err := newWrapper(t, c).Wrap(t.Context(), newKEK(t)); err != nil {
				t.Fatal(err)
			}
			for _, r := range f.sent(encrypt) {
				if got := r.Header.Get("X-Vault-Token"); got != row.token {
					t.Errorf("the request has the token %q, want %q", got, row.token)
				}
			}
			if revoked := len(f.sent("auth/token/revoke-self")) > 0; revoked != (row.token == fakeToken) {
				t.Errorf("the token was revoked: %v", revoked)
			}
		})
	}
}

// brokenSigner is a key that can't sign any more.
type brokenSigner struct {
	crypto.Signer
	err error
}

func (b brokenSigner) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return nil, b.err }

// TestClientCertificateFails: the error names the key, which crypto/tls would hide.
func TestClientCertificateFails(t *testing.T) {
	pair, certFile, keyFile := clientPair(t)
	_, _, otherKey := clientPair(t)
	locked := seal.Errorf(seal.CauseLockout, "wait", "the TPM is locked out")
	given := func(c *tls.Certificate, err error) Auth {
		return Auth{Method: MethodCert, ClientCertificate: func(context.Context) (*tls.Certificate, error) { return c, err }}
	}
	signer := func(err error) *tls.Certificate {
		return &tls.Certificate{Certificate: pair.Certificate, PrivateKey: brokenSigner{pair.PrivateKey.(crypto.Signer), err}}
	}
	for name, row := range map[string]struct {
		auth  Auth
		cause seal.Cause
		says  string
	}{
		"none":                    {given(nil, errors.New("no such key")), seal.CauseCredentials, "vault: client certificate: no such key"},
		"none, with a cause":      {given(nil, locked), seal.CauseLockout, "vault: client certificate: the TPM is locked out"},
		"no signer":               {given(&tls.Certificate{Certificate: pair.Certificate, PrivateKey: "key"}, nil), seal.CauseCredentials, "its key can't sign"},
		"can't sign":              {given(signer(errors.New("no device")), nil), seal.CauseCredentials, "client certificate: no device"},
		"can't sign, and a cause": {given(signer(locked), nil), seal.CauseLockout, "the TPM is locked out"},
		"another's key":           {Auth{Method: MethodCert, CertFile: certFile, KeyFile: otherKey}, seal.CauseCredentials, "they are not a pair"},
		"no certificate file":     {Auth{Method: MethodCert, CertFile: certFile + ".none", KeyFile: keyFile}, seal.CauseCredentials, "vault.auth.certFile"},
		"no key file":             {Auth{Method: MethodCert, CertFile: certFile, KeyFile: keyFile + ".none"}, seal.CauseCredentials, "vault.auth.keyFile"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newFake(t, nil).config()
			c.Auth = row.auth
			_, err := newWrapper(t, c).Wrap(t.Context(), newKEK(t))
			checkError(t, err, row.cause, nil, row.says)
		})
	}
}

// notCredentials are texts that can't be a token or a secret ID, as JSON values.
var notCredentials = map[string]string{"empty": `""`, "null": `null`, "a number": `7`, "a space": `"a b"`, "a line": `"a\r\nX-Evil: b"`, "DEL": `"a\u007f"`, "not ASCII": `"é"`}

// TestNotCredentials: what a server sends as a token or a secret ID goes into a header or a
// body only if it is one word of printable characters.
func TestNotCredentials(t *testing.T) {
	for name, text := range notCredentials {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, at("auth/approle/login", 200, `{"auth":{"client_token":`+text+`}}`))
			_, err := newWrapper(t, f.config()).Wrap(t.Context(), newKEK(t))
			checkError(t, err, seal.CauseUnavailable, ErrNotVault, "holds no token")

			f = newFake(t, func(w http.ResponseWriter, r *http.Request, n int) bool {
				return at("sys/wrapping/unwrap", 200, `{"data":{"secret_id":`+text+`}}`)(w, r, n) || unwraps(nil)(w, r, n)
			})
			w := newWrapper(t, wrappedConfig(t, f))
			if _, err = w.Wrap(t.Context(), newKEK(t)); err == nil || w.Unwrapped() || len(f.sent("auth/approle/login")) != 0 {
				t.Errorf("a secret ID of %s: %v", text, err)
			}
		})
	}
}

// TestWrappedElsewhere: a wrapping token that somebody put in the place of the role's own is
// recognised by where its value was created, before it is unwrapped.
func TestWrappedElsewhere(t *testing.T) {
	for _, path := range []string{"", "auth/other/role/kleidi/secret-id", "auth/approle/role/kleidi/role-id", "secret/data/auth/approle/role/kleidi/secret-id"} {
		f := newFake(t, func(w http.ResponseWriter, r *http.Request, n int) bool {
			return at("sys/wrapping/lookup", 200, fmt.Sprintf(`{"data":{"creation_path":%q}}`, path))(w, r, n) || unwraps(nil)(w, r, n)
		})
		_, err := newWrapper(t, wrappedConfig(t, f)).Wrap(t.Context(), newKEK(t))
		checkError(t, err, seal.CauseCredentials, nil, "not a secret ID of auth/approle/role/")
		if len(f.sent("sys/wrapping/unwrap")) != 0 {
			t.Errorf("a token for %q was unwrapped", path)
		}
	}
}

// TestNextWrappingToken: another token in the file is unwrapped, and the secret ID of the
// last one is closed. After Close no secret ID is kept.
func TestNextWrappingToken(t *testing.T) {
	f := newFake(t, func(w http.ResponseWriter, r *http.Request, n int) bool {
		return at("sys/wrapping/unwrap", 200, `{"data":{"secret_id":"secret_from_the_wrapping"}}`)(w, r, n) || unwraps(nil)(w, r, n)
	})
	c := wrappedConfig(t, f)
	w := newWrapper(t, c)
	wrap := func() {
		t.Helper()
		if _, err := w.Wrap(t.Context(), newKEK(t)); err != nil {
			t.Fatal(err)
		}
	}
	open := func(s *seal.Secret) (open bool) {
		s.With(func(b []byte) { open = len(b) > 0 })
		return open
	}
	wrap()
	first := w.secretID.id
	if err := os.WriteFile(c.Auth.SecretIDFile, []byte("hvs.next-wrapping-token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	wrap()
	second := w.secretID.id
	if n := len(f.sent("sys/wrapping/unwrap")); n != 2 || first == second || open(first) || !open(second) {
		t.Errorf("%d tokens unwrapped; the first secret ID is open: %v, the second: %v", n, open(first), open(second))
	}
	for _, r := range f.sent("auth/approle/login") {
		if r.Header.Get("X-Vault-Token") != "" {
			t.Error("the login has the wrapping token")
		}
	}
	w.Close()
	late, err := seal.Memory{}.Take([]byte("late"))
	if err != nil {
		t.Fatal(err)
	}
	if id := w.cacheSecretID(&unwrapped{id: late}); string(id) != "late" || open(second) || open(late) || w.Unwrapped() {
		t.Errorf("after Close: %q; open: %v, %v", id, open(second), open(late))
	}
}
