package hsm

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

func TestConfig(t *testing.T) {
	good := Config{Module: "/m.so", URI: "pkcs11:token=t;object=k"}
	for _, row := range []struct {
		want string
		edit func(c *Config)
	}{
		{"", func(*Config) {}},
		{"", func(c *Config) { c.TokenLabel, c.KeyLabel = "t", "k" }},
		{"", func(c *Config) { c.Module, c.URI = "", c.URI+"?module-path=/m.so" }},
		{"no PKCS#11 module is named", func(c *Config) { c.Module = "" }},
		{"not an absolute path", func(c *Config) { c.Module = "m.so" }},
		{"module and the URI's module-path differ", func(c *Config) { c.URI += "?module-path=/n.so" }},
		{"tokenLabel and the URI's token differ", func(c *Config) { c.TokenLabel = "u" }},
		{"pinFile \"p\" is not an absolute path", func(c *Config) { c.PINFile = "p" }},
		{"no key is named", func(c *Config) { c.URI = "pkcs11:token=t" }},
		{"a token's label has at most", func(c *Config) { c.URI, c.KeyLabel, c.TokenLabel = "", "k", strings.Repeat("t", 33) }},
		{"a key's label has at most", func(c *Config) { c.KeyID = make([]byte, keyslot.MaxKeyID+1) }},
		{"timeout -1ns", func(c *Config) { c.Timeout = -1 }},
	} {
		c := good
		row.edit(&c)
		_, err := c.resolve()
		if row.want == "" && err != nil || row.want != "" && (err == nil || !strings.Contains(err.Error(), row.want)) {
			t.Errorf("%+v: %v, want %q", c, err, row.want)
		}
	}
	w, err := New(good)
	if haveCgo != (err == nil) || !haveCgo && !errors.Is(err, ErrNoCgo) {
		t.Errorf("New: %v", err)
	}
	if haveCgo && w.Type() != seal.TypePKCS11 {
		t.Error(w.Type())
	}
}

// TestPINSource: the PIN comes from the file or from the program, as configured.
func TestPINSource(t *testing.T) {
	c := Config{Module: "/m.so", KeyLabel: "k", PIN: func(context.Context) (*seal.Secret, error) { return seal.Memory{}.Take([]byte("1234")) }}
	target, err := c.resolve()
	if err != nil {
		t.Fatal(err)
	}
	p, err := target.pin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if size(p) != 4 {
		t.Errorf("%d bytes", size(p))
	}
	sealed := seal.Errorf(seal.CauseOtherTPM, "seal it again", "it is another TPM's")
	for _, c := range []struct {
		err   error
		cause seal.Cause
		text  string
	}{{errors.New("boom"), seal.CauseCredentials, "get the PIN: boom; see"}, {sealed, seal.CauseOtherTPM, "it is another TPM's; seal it again"}} {
		w := Config{Module: "/m.so", KeyLabel: "k", PIN: func(context.Context) (*seal.Secret, error) { return nil, c.err }}
		target, err := w.resolve()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := target.pin(t.Context()); seal.CauseOf(err) != c.cause || !strings.HasPrefix(err.Error(), c.text) {
			t.Errorf("%v: %v", c.err, err)
		}
	}
	for _, twice := range []Config{{PINFile: "/f"}, {URI: "pkcs11:token=t?pin-source=file:/f"}} {
		twice.Module, twice.KeyLabel, twice.PIN = c.Module, c.KeyLabel, c.PIN
		if _, err := twice.resolve(); err == nil || !strings.Contains(err.Error(), "names a PIN beside sealedPINFile; remove one of them") {
			t.Errorf("%+v: %v", twice, err)
		}
	}
}

// size returns the size of a PIN, or 0 for none.
func size(p *seal.Secret) (n int) {
	if p != nil {
		p.With(func(b []byte) { n = len(b) })
	}
	return n
}

func TestParseLegacy(t *testing.T) {
	const good = `{"tokenLabel": "kleidi", "pin": "s3cret", "path": "/usr/lib64/softhsm/libsofthsm.so", "maxSessions": 5}`
	c, pin, err := ParseLegacy(seal.Memory{}, []byte(good))
	if err != nil {
		t.Fatal(err)
	}
	defer pin.Close()
	if c.Module != "/usr/lib64/softhsm/libsofthsm.so" || c.TokenLabel != "kleidi" || c.KeyLabel != "kleidi-kms-plugin" || c.PINFile != "" {
		t.Errorf("%+v", c)
	}
	pin.With(func(b []byte) {
		if string(b) != "s3cret" {
			t.Error("the PIN differs")
		}
	})
	for _, bad := range []string{"", "[]", "{}", `{"pin":"s3cret"}`, `{"pin":"s3cret","path":"/m"}`, `{"pin":"s3cret","path":"m","tokenLabel":"t"}`,
		`{"path":"/m","tokenLabel":"t"}`, `{"pin":7,"path":"/m","tokenLabel":"t"}`, `{"pin":"","path":"/m","tokenLabel":"t"}`, `{"pin":"s3cret\n","path":"/m","tokenLabel":"t"}`,
		`{"path":["s3cret"]}`, `{"pin":"s3cret","path":"/m","tokenLabel":"` + strings.Repeat("t", 33) + `"}`, strings.Repeat(" ", MaxLegacy) + good} {
		_, pin, err := ParseLegacy(seal.Memory{}, []byte(bad))
		if err == nil || pin != nil || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%.60s: %v", bad, err)
		}
	}
}

// TestLegacyVaultConfiguration: kleidi 1.x had another config.json for Vault
// (configuration/kleidi/cert-auth; the values are replaced).
func TestLegacyVaultConfiguration(t *testing.T) {
	vault, err := os.ReadFile("testdata/kleidi1/vault-config.json")
	if err != nil {
		t.Fatal(err)
	}
	const want = "this is kleidi 1.x's configuration of Vault, not of a PKCS#11 token: see docs/vault.md"
	for _, s := range []string{string(vault), `{"TransitKey": "k"}`, `{"address": "https://v", "transitpath": "transit", "pin": ""}`} {
		if _, _, err := ParseLegacy(seal.Memory{}, []byte(s)); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %q", s, err, want)
		}
	}
}

// TestWhoseSlot: keys are compared by their IDs, or by their labels if one has no ID.
func TestWhoseSlot(t *testing.T) {
	for _, row := range []struct {
		config keyMatch
		slot   keyslot.KeyName
		want   bool
	}{
		{keyMatch{label: "a"}, keyslot.KeyName{Label: "a"}, true},
		{keyMatch{label: "a"}, keyslot.KeyName{Label: "b"}, false},
		{keyMatch{label: "a"}, keyslot.KeyName{Label: "b", ID: keyslot.HexID{1}}, true}, // renamed, perhaps: the token tells
		{keyMatch{id: []byte{1}}, keyslot.KeyName{Label: "b", ID: keyslot.HexID{1}}, true},
		{keyMatch{label: "b", id: []byte{2}}, keyslot.KeyName{Label: "b", ID: keyslot.HexID{1}}, false},
		{keyMatch{id: []byte{2}}, keyslot.KeyName{Label: "b"}, true},
	} {
		if got := row.config.mayMatch(row.slot); got != row.want {
			t.Errorf("%v, slot of %+v: %v", row.config, row.slot, got)
		}
	}
}
