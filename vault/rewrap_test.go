package vault

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// TestRewrap: the server rewraps this wrapper's own slots and no others.
func TestRewrap(t *testing.T) {
	var sent string
	f := newFake(t, func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.URL.Path != "/v1/transit/rewrap/kleidi" {
			return false
		}
		b, _ := io.ReadAll(r.Body)
		sent = string(b)
		answer(w, http.StatusOK, `{"data":{"ciphertext":"vault:v3:AAAA"}}`)
		return true
	})
	w, c := newWrapper(t, f.config()), f.config()
	c.Key = "other"
	rewrapped, err := w.Rewrap(t.Context(), slotOf(t, w, "vault:v2:BBBB"))
	if err != nil || sent != `{"ciphertext":"vault:v2:BBBB"}` {
		t.Fatalf("sent %s: %v", sent, err)
	}
	if v, err := Version(rewrapped); err != nil || v != 3 {
		t.Errorf("version %d, %v", v, err)
	}
	theirs := slotOf(t, newWrapper(t, c), "vault:v2:BBBB")
	if _, err := w.Rewrap(t.Context(), theirs); !isError(err, seal.ErrNotMine) {
		t.Error(err)
	}
	if _, err := w.WrapLike(t.Context(), newKEK(t), theirs); !isError(err, seal.ErrNotMine) {
		t.Error(err)
	}
	if _, err := w.WrapLike(t.Context(), newKEK(t), rewrapped); err != nil {
		t.Error(err)
	}
}

// TestCiphertextRefused: why the server doesn't decrypt a slot.
func TestCiphertextRefused(t *testing.T) {
	for name, row := range map[string]struct {
		status int
		text   string
		cause  seal.Cause
		is     error
	}{
		"damaged":   {400, "cipher: message authentication failed", seal.CauseSlotCorrupt, nil},
		"too old":   {400, textTooOld, seal.CauseUnavailable, ErrTooOld},
		"no key":    {400, textKeyMissing, seal.CauseKeyMissing, ErrKeyMissing},
		"not found": {404, "no handler for route", seal.CauseUnavailable, ErrMountMissing},
	} {
		w := newWrapper(t, newFake(t, at("transit/decrypt/kleidi", row.status, `{"errors":["`+row.text+`"]}`)).config())
		_, err := w.Unwrap(t.Context(), slotOf(t, w, "vault:v2:BBBB"))
		t.Run(name, func(t *testing.T) { checkError(t, err, row.cause, row.is) })
	}
	_, err := newWrapper(t, newFake(t, at(encrypt, 400, `{"errors":["`+textTooOld+`"]}`)).config()).Wrap(t.Context(), newKEK(t))
	if seal.CauseOf(err) != seal.CauseUnavailable || isError(err, ErrTooOld) || strings.Contains(err.Error(), "slot") {
		t.Errorf("a refused encryption is explained as one of a slot: %v", err)
	}
}

// TestRepeatedSecrets: no answer that repeats the KEK or a credential is quoted.
func TestRepeatedSecrets(t *testing.T) {
	repeat := func(path string) func(http.ResponseWriter, *http.Request, int) bool {
		return func(w http.ResponseWriter, r *http.Request, n int) bool {
			if r.URL.Path != "/v1/"+path {
				return false
			}
			b, _ := io.ReadAll(r.Body)
			text := strings.NewReplacer(`"`, ``, `{`, ``, `}`, ``, `\`, ``).Replace(string(b))
			if path == "sys/wrapping/unwrap" { // its secret is its token
				text = r.Header.Get("X-Vault-Token")
			}
			answer(w, http.StatusBadRequest, `{"errors":["unexpected `+text+`"]}`)
			return true
		}
	}
	for _, path := range []string{encrypt, "auth/approle/login", "sys/wrapping/lookup", "sys/wrapping/unwrap"} {
		f := newFake(t, func(w http.ResponseWriter, r *http.Request, n int) bool {
			return repeat(path)(w, r, n) || strings.HasPrefix(path, "sys/") && unwraps(nil)(w, r, n)
		})
		c := f.config()
		if strings.HasPrefix(path, "sys/") {
			c = wrappedConfig(t, f)
		}
		_, err := newWrapper(t, c).Wrap(t.Context(), newKEK(t))
		if err == nil || !strings.Contains(err.Error(), "withheld") {
			t.Errorf("%s: %v", path, err)
		}
	}
}
