package vault

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/sealtest"
	"github.com/beezy-dev/kleidi/vault/internal/client"
)

func isError(err, target error) bool { return errors.Is(err, target) }

// TestConformance shows that the fake is good enough for the other tests. e2e/vault runs the
// suite with the real server.
func TestConformance(t *testing.T) {
	c := newFake(t, nil).config()
	other := c
	other.Key = "other"
	sealtest.Run(t, func(t *testing.T) sealtest.Harness {
		return sealtest.Harness{Wrapper: newWrapper(t, c), Other: newWrapper(t, other), Stride: 1000}
	})
}

// at returns a before that answers the requests for a path.
func at(path string, status int, body string) func(http.ResponseWriter, *http.Request, int) bool {
	return func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if r.URL.Path != "/v1/"+path {
			return false
		}
		answer(w, status, body)
		return true
	}
}

const encrypt = "transit/encrypt/kleidi"

// TestAnswers: each answer of a server, or of a proxy before it, has its explanation.
func TestAnswers(t *testing.T) {
	html := func(status int) func(http.ResponseWriter, *http.Request, int) bool {
		return func(w http.ResponseWriter, _ *http.Request, _ int) bool {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			w.WriteHeader(status)
			_, _ = io.WriteString(w, "<html>log in to the proxy</html>")
			return true
		}
	}
	for name, row := range map[string]struct {
		before func(http.ResponseWriter, *http.Request, int) bool
		cause  seal.Cause
		is     error
		says   string
	}{
		"a token that expired": {at(encrypt, 403, `{"errors":["2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n"]}`),
			seal.CauseCredentials, ErrToken, "vault.auth.secretIDFile"},
		"a token that can't ask": {func(w http.ResponseWriter, r *http.Request, n int) bool {
			return at(encrypt, 403, `{"errors":["permission denied"]}`)(w, r, n) || at("sys/capabilities-self", 403, `{"errors":["permission denied"]}`)(w, r, n)
		}, seal.CauseCredentials, ErrDenied, `"update" on "sys/capabilities-self"; or renew it`},
		"a proxy's page":          {html(http.StatusOK), seal.CauseUnavailable, ErrNotVault, `is "text/html; charset=utf-8" and not application/json`},
		"a proxy's refusal":       {html(http.StatusForbidden), seal.CauseUnavailable, ErrNotVault, "status 403"},
		"a gateway's failure":     {html(http.StatusBadGateway), seal.CauseUnavailable, ErrNotVault, "status 502"},
		"recovery secondary":      {at(encrypt, 472, `{"errors":[]}`), seal.CauseUnavailable, ErrStandby, "status 472"},
		"performance standby":     {at(encrypt, 473, `{"errors":[]}`), seal.CauseUnavailable, ErrStandby, "set vault.address to the active server"},
		"OpenBao sealed":          {at(encrypt, 503, `{"errors":["OpenBao is sealed"]}`), seal.CauseUnavailable, ErrSealed, "unseal it"},
		"failure":                 {at(encrypt, 500, `{"errors":["1 error occurred:\n\t* storage"]}`), seal.CauseUnavailable, nil, `status 500, "storage"`},
		"too large for it":        {at(encrypt, 413, `{"errors":["http: request body too large"]}`), seal.CauseUnavailable, nil, "max_request_size"},
		"no such namespace":       {at(encrypt, 404, `{"errors":["no handler for route \"transit/encrypt/kleidi\". route entry not found."]}`), seal.CauseUnavailable, ErrMountMissing, "vault.namespace"},
		"login: no such method":   {at("auth/approle/login", 404, `{"errors":["no handler"]}`), seal.CauseCredentials, ErrMountMissing, "vault.auth.mount"},
		"login: no token":         {at("auth/approle/login", 200, `{"auth":null}`), seal.CauseUnavailable, ErrNotVault, "holds no token"},
		"login: token with lines": {at("auth/approle/login", 200, `{"auth":{"client_token":"a\r\nX-Evil: b"}}`), seal.CauseUnavailable, ErrNotVault, "holds no token"},
		"no JSON":                 {at(encrypt, 200, `{"data":`), seal.CauseUnavailable, ErrNotVault, "malformed JSON"},
		"no ciphertext":           {at(encrypt, 200, `{"data":{"ciphertext":"plain"}}`), seal.CauseUnavailable, nil, "holds no ciphertext"},
		"a huge ciphertext":       {at(encrypt, 200, `{"data":{"ciphertext":"vault:v1:`+strings.Repeat("A", 5000)+`"}}`), seal.CauseUnavailable, nil, "at most 4096"},
		"a huge answer":           {at(encrypt, 200, strings.Repeat(" ", client.MaxAnswer+1)), seal.CauseUnavailable, ErrNotVault, "more than 65536 bytes"},
		"a huge refusal":          {at(encrypt, 400, `{"errors":["`+strings.Repeat("no ", 9000)+`"]}`), seal.CauseUnavailable, nil, "…"},
		"huge headers": {func(w http.ResponseWriter, _ *http.Request, _ int) bool {
			w.Header().Set("X-Large", strings.Repeat("a", 1<<20))
			answer(w, http.StatusOK, "{}")
			return true
		}, seal.CauseUnavailable, ErrNotVault, "headers are too large"},
		"an answer that ends early": {func(w http.ResponseWriter, _ *http.Request, _ int) bool {
			w.Header().Set("Content-Length", "100")
			answer(w, http.StatusOK, `{"auth"`)
			panic(http.ErrAbortHandler)
		}, seal.CauseUnavailable, nil, "the connection breaks off"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newFake(t, row.before).config()
			_, err := newWrapper(t, c).Wrap(t.Context(), newKEK(t))
			checkError(t, err, row.cause, row.is, row.says)
		})
	}
}

// TestRetries: a request is repeated after a temporary failure, and not before the time
// that the server names.
func TestRetries(t *testing.T) {
	for name, row := range map[string]struct {
		status int
		after  string
		least  time.Duration
	}{
		"rate-limited, says when": {http.StatusTooManyRequests, "1", time.Second},
		"rate-limited":            {http.StatusTooManyRequests, "", 0},
		"no leader yet":           {http.StatusServiceUnavailable, "", 0},
		"not replicated yet":      {http.StatusPreconditionFailed, "", 0},
		"a gateway's failure":     {http.StatusBadGateway, "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, func(w http.ResponseWriter, r *http.Request, n int) bool {
				if r.URL.Path != "/v1/"+encrypt || n > 2 {
					return false
				}
				if row.after != "" && n == 1 {
					w.Header().Set("Retry-After", row.after)
				}
				answer(w, row.status, `{"errors":[]}`)
				return true
			})
			began := time.Now()
			if _, err := newWrapper(t, f.config()).Wrap(t.Context(), newKEK(t)); err != nil {
				t.Fatal(err)
			}
			if d := time.Since(began); d < row.least {
				t.Errorf("it came back after %s, told %s", d, row.least)
			}
			if n := len(f.sent(encrypt)); n != 3 {
				t.Errorf("%d requests, want 3", n)
			}
		})
	}
}

// TestNoRetries: a request is not repeated after a lasting failure.
func TestNoRetries(t *testing.T) {
	for name, before := range map[string]func(http.ResponseWriter, *http.Request, int) bool{
		"sealed":      at(encrypt, 503, `{"errors":["Vault is sealed"]}`),
		"bad request": at(encrypt, 400, `{"errors":["bad"]}`),
		"told to wait longer than there is time": func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.Header().Set("Retry-After", "3600")
			return at(encrypt, 429, `{"errors":[]}`)(w, r, n)
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, before)
			if _, err := newWrapper(t, f.config()).Wrap(t.Context(), newKEK(t)); err == nil {
				t.Fatal("it succeeds")
			}
			if n := len(f.sent(encrypt)); n != 1 {
				t.Errorf("%d requests, want 1", n)
			}
		})
	}
}

// TestRedirects: a redirect is followed once, and only to https, to the same path and to a
// server of the same CA.
func TestRedirects(t *testing.T) {
	active := newFake(t, nil)
	strange := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(strange.Close)
	to := func(location func(r *http.Request) string) func(http.ResponseWriter, *http.Request, int) bool {
		return func(w http.ResponseWriter, r *http.Request, _ int) bool {
			w.Header().Set("Location", location(r))
			w.WriteHeader(http.StatusTemporaryRedirect)
			return true
		}
	}
	for name, row := range map[string]struct {
		location func(r *http.Request) string
		says     string // empty: it works
	}{
		"to the active server": {func(r *http.Request) string { return active.URL + r.URL.Path }, ""},
		"to http":              {func(r *http.Request) string { return strange.URL + r.URL.Path }, "something other than https://HOST:PORT and the same path"},
		"to another path":      {func(*http.Request) string { return active.URL + "/v1/sys/raw" }, "something other than https://HOST:PORT and the same path"},
		"with a password":      {func(r *http.Request) string { return "https://a:b@" + r.Host + r.URL.Path }, "something other than https://HOST:PORT and the same path"},
		"to itself":            {func(r *http.Request) string { return "https://" + r.Host + r.URL.Path }, "redirects again"},
		"nowhere":              {func(*http.Request) string { return "" }, "something other than https://HOST:PORT and the same path"},
	} {
		t.Run(name, func(t *testing.T) {
			kek := newKEK(t)
			w := newWrapper(t, newFake(t, to(row.location)).config())
			slot, err := w.Wrap(t.Context(), kek)
			if row.says != "" {
				checkError(t, err, seal.CauseUnavailable, ErrStandby, row.says, "correct api_addr")
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := w.Unwrap(t.Context(), slot)
			if err != nil {
				t.Fatal(err)
			}
			defer got.Close()
			if !got.Equal(kek) {
				t.Error("another KEK")
			}
		})
	}
}

// TestEcho: if a server repeats a secret in its answer, no message quotes it.
func TestEcho(t *testing.T) {
	for _, path := range []string{"auth/approle/login", encrypt} {
		f := newFake(t, func(w http.ResponseWriter, r *http.Request, _ int) bool {
			if r.URL.Path != "/v1/"+path {
				return false
			}
			body, _ := io.ReadAll(r.Body)
			answer(w, http.StatusBadRequest, fmt.Sprintf(`{"errors":[%q]}`, string(body)+r.Header.Get("X-Vault-Token")))
			return true
		})
		kek := newKEK(t)
		_, err := newWrapper(t, f.config()).Wrap(t.Context(), kek)
		if err == nil {
			t.Fatal("it succeeds")
		}
		kek.With(func(b []byte) {
			if strings.Contains(err.Error(), base64.RawStdEncoding.EncodeToString(b)) {
				t.Errorf("the error holds the KEK: %v", err)
			}
		})
		checkError(t, err, seal.CauseOf(err), nil, "its text is withheld")
	}
}

// TestEnvironment: the variables of the client library and those of proxies have no effect.
func TestEnvironment(t *testing.T) {
	proxy := newFake(t, nil)
	for name, value := range map[string]string{
		"VAULT_ADDR": proxy.URL, "VAULT_AGENT_ADDR": proxy.URL, "VAULT_TOKEN": "from-the-environment", "VAULT_NAMESPACE": "from-the-environment",
		"VAULT_HEADERS": `{"X-Extra":"from-the-environment"}`, "VAULT_WRAP_TTL": "60s", "VAULT_SKIP_VERIFY": "true",
		"VAULT_TLS_SERVER_NAME": "from-the-environment", "VAULT_CLIENT_TIMEOUT": "1ns", "VAULT_MAX_RETRIES": "100", "VAULT_RATE_LIMIT": "1:1",
		"VAULT_HTTP_PROXY": proxy.URL, "VAULT_PROXY_ADDR": proxy.URL, "HTTPS_PROXY": proxy.URL, "https_proxy": proxy.URL, "ALL_PROXY": proxy.URL,
	} {
		t.Setenv(name, value)
	}
	f := newFake(t, nil)
	c := f.config()
	c.Namespace = "team/a"
	kek := newKEK(t)
	w := newWrapper(t, c)
	slot, err := w.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	got, err := w.Unwrap(t.Context(), slot)
	if err != nil {
		t.Fatal(err)
	}
	got.Close()
	if n := len(proxy.requests); n > 0 {
		t.Errorf("%d requests went to the environment's server", n)
	}
	for _, r := range f.requests {
		if text := fmt.Sprint(r.Header); strings.Contains(text, "from-the-environment") || r.Header.Get("X-Vault-Wrap-TTL") != "" {
			t.Errorf("%s was sent %s", r.URL.Path, text)
		}
		if r.Header.Get("X-Vault-Namespace") != "team/a" || r.Header.Get("X-Vault-Request") != "true" {
			t.Errorf("%s was sent %v", r.URL.Path, r.Header)
		}
	}
	c.CAFile = newFakeOfAnotherCA(t)
	_, err = newWrapper(t, c).Wrap(t.Context(), kek)
	checkError(t, err, seal.CauseUnavailable, nil, "set vault.caFile")
}

// TestEnvironmentThatTheLibraryRefuses: the error names the variables, but not their values.
func TestEnvironmentThatTheLibraryRefuses(t *testing.T) {
	for name, value := range map[string]string{"VAULT_HEADERS": "{secret-of-a-header", "VAULT_CACERT": "/nowhere", "VAULT_CLIENT_TIMEOUT": "soon"} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(name, value)
			_, err := newWrapper(t, newFake(t, nil).config()).Wrap(t.Context(), newKEK(t))
			checkError(t, err, seal.CauseUnavailable, nil, name, "unset them")
			if strings.Contains(err.Error(), value) {
				t.Errorf("the error holds the value: %v", err)
			}
		})
	}
}

// TestConnectionPerRequest: an operation succeeds with a server that closes the connection
// after each answer.
func TestConnectionPerRequest(t *testing.T) {
	f := newFake(t, nil)
	f.Config.SetKeepAlivesEnabled(false)
	w, kek := newWrapper(t, f.config()), newKEK(t)
	slot, err := w.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	got, err := w.Unwrap(t.Context(), slot)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !got.Equal(kek) {
		t.Error("another KEK")
	}
}

// TestLateCancel: an operation that is cancelled after its answer still revokes its token.
func TestLateCancel(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	f := newFake(t, func(_ http.ResponseWriter, r *http.Request, _ int) bool {
		if r.URL.Path == "/v1/"+encrypt {
			cancel()
		}
		return false
	})
	_, _ = newWrapper(t, f.config()).Wrap(ctx, newKEK(t))
	if n := len(f.sent("auth/token/revoke-self")); n != 1 {
		t.Errorf("the token was given back %d times", n)
	}
}

// TestLostAnswerToRevoke: an operation succeeds even if its token can't be revoked.
func TestLostAnswerToRevoke(t *testing.T) {
	f := newFake(t, at("auth/token/revoke-self", http.StatusForbidden, `{"errors":["permission denied"]}`))
	if _, err := newWrapper(t, f.config()).Wrap(t.Context(), newKEK(t)); err != nil {
		t.Fatal(err)
	}
	if n := len(f.sent("auth/token/revoke-self")); n != 1 {
		t.Errorf("the token was given back %d times", n)
	}
}
