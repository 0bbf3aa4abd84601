package vault

import (
	"net/http"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// settings returns a before with these settings of the Transit key, and these capabilities
// of the token.
func settings(key, capabilities string) func(http.ResponseWriter, *http.Request, int) bool {
	return func(w http.ResponseWriter, r *http.Request, n int) bool {
		return at("transit/keys/kleidi", http.StatusOK, `{"data":`+key+`}`)(w, r, n) ||
			at("sys/capabilities-self", http.StatusOK, `{"data":{"capabilities":[`+capabilities+`]}}`)(w, r, n)
	}
}

// TestCheck: each setting that keeps a slot of version 2 from opening, or that lets others
// open it, has its own warning, and a good key has none.
func TestCheck(t *testing.T) {
	for name, row := range map[string]struct {
		key, capabilities string
		warnings          []string
	}{
		"good":            {`{"latest_version":2}`, `"update"`, nil},
		"older key":       {`{"latest_version":1}`, ``, []string{"newest version is 1, so this is another key of the same name"}},
		"too old":         {`{"latest_version":4,"min_decryption_version":3}`, ``, []string{"min_decryption_version is 3, so the slot doesn't open"}},
		"behind":          {`{"latest_version":3,"min_decryption_version":2}`, ``, []string{"the newest version is 3; run kleidi slot rewrap"}},
		"deletable":       {`{"latest_version":2,"deletion_allowed":true}`, ``, []string{"can be deleted"}},
		"exportable":      {`{"latest_version":2,"exportable":true}`, ``, []string{"can leave the server"}},
		"backup":          {`{"latest_version":2,"allow_plaintext_backup":true}`, ``, []string{"can leave the server"}},
		"derived":         {`{"latest_version":2,"derived":true}`, ``, []string{"needs a context"}},
		"may create":      {`{"latest_version":2}`, `"create","update"`, []string{"can create a Transit key"}},
		"a root token":    {`{"latest_version":2}`, `"root"`, []string{"can create a Transit key"}},
		"all of it wrong": {`{"latest_version":3,"deletion_allowed":true,"derived":true}`, `"root"`, []string{"newest version is 3", "deleted", "context", "create"}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWrapper(t, newFake(t, settings(row.key, row.capabilities)).config())
			warnings, err := w.Check(t.Context(), slotOf(t, w, "vault:v2:AAAA"))
			if err != nil || len(warnings) != len(row.warnings) {
				t.Fatalf("%q, %v", warnings, err)
			}
			for i, want := range row.warnings {
				if !strings.Contains(warnings[i], want) {
					t.Errorf("%q does not say %q", warnings[i], want)
				}
			}
		})
	}
}

// TestCheckFails: settings that can't be read are not reported as good.
func TestCheckFails(t *testing.T) {
	denied := at("transit/keys/kleidi", http.StatusForbidden, `{"errors":["permission denied"]}`)
	w := newWrapper(t, newFake(t, func(w http.ResponseWriter, r *http.Request, n int) bool {
		return denied(w, r, n) || settings(`{}`, `"update"`)(w, r, n)
	}).config())
	warnings, err := w.Check(t.Context(), slotOf(t, w, "vault:v2:AAAA"))
	if err != nil || len(warnings) != 1 || !strings.Contains(warnings[0], "grant the capability read on transit/keys/kleidi") {
		t.Errorf("without the capability: %q, %v", warnings, err)
	}
	for name, row := range map[string]struct {
		before func(http.ResponseWriter, *http.Request, int) bool
		cause  seal.Cause
		is     error
	}{
		"a token that expired": {func(w http.ResponseWriter, r *http.Request, n int) bool {
			return denied(w, r, n) || at("sys/capabilities-self", http.StatusForbidden, `{"errors":["permission denied"]}`)(w, r, n)
		}, seal.CauseCredentials, ErrDenied},
		"no version":   {settings(`{"deletion_allowed":false}`, `"update"`), seal.CauseUnavailable, ErrNotVault},
		"no JSON":      {at("transit/keys/kleidi", http.StatusOK, `{"data":{"latest_version":2}`), seal.CauseUnavailable, ErrNotVault},
		"another type": {settings(`{"latest_version":2,"derived":"false"}`, `"update"`), seal.CauseUnavailable, ErrNotVault},
		"sealed":       {at("transit/keys/kleidi", http.StatusServiceUnavailable, `{"errors":["Vault is sealed"]}`), seal.CauseUnavailable, ErrSealed},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWrapper(t, newFake(t, row.before).config())
			warnings, err := w.Check(t.Context(), slotOf(t, w, "vault:v2:AAAA"))
			checkError(t, err, row.cause, row.is)
			if warnings != nil {
				t.Errorf("warnings beside the error: %q", warnings)
			}
		})
	}
	f := newFake(t, nil)
	w, other := newWrapper(t, f.config()), f.config()
	other.Key = "other"
	if _, err := w.Check(t.Context(), slotOf(t, newWrapper(t, other), "vault:v2:AAAA")); !isError(err, seal.ErrNotMine) || len(f.requests) != 0 {
		t.Errorf("another key's slot: %v, %d requests", err, len(f.requests))
	}
}

func slotOf(t *testing.T, w *Wrapper, ciphertext string) seal.Slot {
	t.Helper()
	slot, err := w.config.slot(ciphertext)
	if err != nil {
		t.Fatal(err)
	}
	return slot
}

// TestDescribe: what an operator reads about a slot.
func TestDescribe(t *testing.T) {
	f := newFake(t, nil)
	c := f.config()
	for want, change := range map[string]func(*Config){
		"key kleidi of transit, version 2":      func(*Config) {},
		"key kleidi of team/transit, version 2": func(c *Config) { c.Namespace = "team" },
		"key other of kms/transit, version 2":   func(c *Config) { c.Key, c.Mount = "other", "kms/transit" },
	} {
		c := c
		change(&c)
		if got := Describe(slotOf(t, newWrapper(t, c), "vault:v2:AAAA")); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	if got := Describe(seal.Slot{Type: seal.TypeVault, Data: []byte("{}")}); got != "unreadable" {
		t.Errorf("%q", got)
	}
}
