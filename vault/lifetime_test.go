package vault

import (
	"net/http"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// lookup answers a question about the token with this body. Nothing else may be asked.
func lookup(t *testing.T, status int, body string) *Wrapper {
	t.Helper()
	f := newFake(t, func(w http.ResponseWriter, r *http.Request, n int) bool {
		switch r.URL.Path {
		case "/v1/auth/token/lookup-self":
			if r.Method != http.MethodGet || r.Header.Get("X-Vault-Token") != fakeToken || n > 1 {
				t.Errorf("%s with token %q, for the %d. time", r.Method, r.Header.Get("X-Vault-Token"), n)
			}
			answer(w, status, body)
		case "/v1/sys/capabilities-self":
			answer(w, http.StatusForbidden, `{"errors":["permission denied"]}`)
		default:
			t.Errorf("%s is asked", r.URL.Path)
			return false
		}
		return true
	})
	c := f.config()
	c.Auth = Auth{Method: MethodToken, TokenFile: credential(t, fakeToken)}
	return newWrapper(t, c)
}

// TestLifetime: the answers are in the form of Vault 1.21.
func TestLifetime(t *testing.T) {
	for body, want := range map[string]Lifetime{
		`{"data":{"creation_ttl":3600,"expire_time":"2026-11-01T12:00:00.5Z","num_uses":0,"renewable":true,"ttl":3000,"type":"service"}}`: {
			Ends: time.Date(2026, 11, 1, 12, 0, 0, 5e8, time.UTC), Lives: time.Hour, Renewable: true},
		`{"data":{"creation_ttl":0,"expire_time":null,"num_uses":0,"ttl":0}}`: {},
		`{"data":{"creation_ttl":0,"expire_time":null,"num_uses":4,"ttl":0}}`: {Uses: 4},
	} {
		if got, err := lookup(t, http.StatusOK, body).Lifetime(t.Context()); err != nil || got != want {
			t.Errorf("%s: %+v, %v", body, got, err)
		}
	}
	got, err := lookup(t, http.StatusForbidden, `{"errors":["2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n"]}`).Lifetime(t.Context())
	if err != nil || got != (Lifetime{Invalid: true}) {
		t.Errorf("an invalid token: %+v, %v", got, err)
	}
	_, err = lookup(t, http.StatusForbidden, `{"errors":["1 error occurred:\n\t* permission denied\n\n"]}`).Lifetime(t.Context())
	checkError(t, err, seal.CauseCredentials, ErrDenied, "auth/token/lookup-self")
	_, err = lookup(t, http.StatusOK, `{}`).Lifetime(t.Context())
	checkError(t, err, seal.CauseUnavailable, ErrNotVault)
}

// TestLifetimeWithoutToken: nothing is asked if kleidi would have to log in first.
func TestLifetimeWithoutToken(t *testing.T) {
	f := newFake(t, nil)
	if _, err := newWrapper(t, f.config()).Lifetime(t.Context()); err == nil || len(f.requests) > 0 {
		t.Errorf("%v, %d requests", err, len(f.requests))
	}
}
