package hsm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/seal"
)

func TestParseURI(t *testing.T) {
	three := uint(3)
	for s, want := range map[string]uri{
		"pkcs11:": {},
		"pkcs11:token=My%20token;object=kek;id=%01%ff;type=secret-key":         {token: "My token", object: "kek", id: []byte{1, 0xff}, class: classSecret},
		"pkcs11:serial=1;manufacturer=m;model=o;slot-id=3;type=private":        {serial: "1", manufacturer: "m", model: "o", slotID: &three, class: classPrivate},
		"pkcs11:object=a&b?module-path=/usr/lib/m.so&pin-source=file:/etc/pin": {object: "a&b", modulePath: "/usr/lib/m.so", pinFile: "/etc/pin"},
		"pkcs11:object=k?pin-source=file:///etc/pin":                           {object: "k", pinFile: "/etc/pin"},
		"PKCS11:object=k":                          {object: "k"},
		"Pkcs11:object=k?pin-source=FILE:/etc/pin": {object: "k", pinFile: "/etc/pin"},
		"pkcs11:object=k?pin-source=/etc/pin":      {object: "k", pinFile: "/etc/pin"},
		"pkcs11:model=SoftHSM%20v2;manufacturer=SoftHSM%20project;serial=ab;token=t;id=%61": {model: "SoftHSM v2", manufacturer: "SoftHSM project", serial: "ab", token: "t", id: []byte("a")},
	} {
		if got, err := parseURI(s); err != nil || !reflect.DeepEqual(*got, want) {
			t.Errorf("%s: %+v, %v, want %+v", s, got, err, want)
		}
	}
	const secret = "hunter2"
	for s, want := range map[string]string{
		"pkcs11":                                      "begin with pkcs11:",
		"pkcs12:object=" + secret:                     "begin with pkcs11:",
		"pkcs11:OBJECT=k":                             "doesn't use",
		"http:" + secret:                              "begin with pkcs11:",
		"pkcs11:object=k?pin-value=" + secret:         "does not belong in a configuration",
		"pkcs11:object=k?pin-value=" + secret + "%zz": "malformed %-escape",
		"pkcs11:object=k?pin-source=|" + secret:       "kleidi reads and runs nothing else",
		"pkcs11:object=k?pin-source=file:" + secret:   "file:/absolute/path",
		"pkcs11:object=k?pin-source=ftp:/etc/pin":     "file:/absolute/path",
		"pkcs11:object=k?module-name=softhsm":         "does not search for modules by name",
		"pkcs11:object=k?module-path=m.so":            "absolute path",
		"pkcs11:object=k;object=l":                    "twice",
		"pkcs11:object=":                              "empty",
		"pkcs11:object=k;":                            "doesn't use",
		"pkcs11:x-vendor=k":                           "doesn't use",
		"pkcs11:slot-id=-1":                           "want a number",
		"pkcs11:type=cert":                            "secret-key (AES) or private (RSA)",
		"pkcs11:object=%ff":                           "UTF-8",
		"pkcs11:" + strings.Repeat("a", maxURI):       "more than",
	} {
		_, err := parseURI(s)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), secret) {
			t.Errorf("%.80s: %v, want %q", s, err, want)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	for _, s := range []string{"pkcs11:", "pkcs11:token=t;object=k;id=%01;type=private;slot-id=1?module-path=/m&pin-source=file:/p", "pkcs11:id=%", "pkcs11:a=b?pin-value=1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := parseURI(s)
		if err != nil {
			if len(err.Error()) > 400 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		if u.modulePath != "" && !filepath.IsAbs(u.modulePath) || u.pinFile != "" && !filepath.IsAbs(u.pinFile) {
			t.Errorf("%q: a relative path", s)
		}
	})
}

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
		{"a key's label has at most", func(c *Config) { c.KeyID = make([]byte, maxKeyID+1) }},
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

func TestPINFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pin")
	for content, want := range map[string]int{"1234": 4, "1234\n": 4, "1234\r\n": 4, " 12 \n34\n": 4, "": 0, "\n": 0,
		strings.Repeat("1", maxPIN) + "\n": maxPIN, strings.Repeat("1", maxPIN+1): 0} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		p, err := ReadPIN(seal.Memory{}, path)
		if size(p) != want || (err == nil) != (want > 0) {
			t.Errorf("%.20q: %d bytes, %v", content, size(p), err)
		}
		if err != nil && (seal.CauseOf(err) != seal.CauseCredentials || strings.Contains(err.Error(), "1111")) {
			t.Error(err)
		}
		closePIN(p)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o660} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadPIN(seal.Memory{}, path); err == nil {
			t.Errorf("mode %o is taken", mode)
		}
	}
	fifo := path + ".fifo"
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, other := range []string{fifo, filepath.Dir(path), path + ".missing"} {
		if _, err := ReadPIN(seal.Memory{}, other); seal.CauseOf(err) != seal.CauseCredentials {
			t.Errorf("%s: %v", other, err)
		}
	}
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

const goldenSlot = `{"form":"pkcs11-v1","mechanism":"aes-gcm","token":{"label":"kleidi-a","serial":"ce3c1e1af5af1d86"},"key":{"label":"kek","id":"0102"},` +
	`"iv":"AAECAwQFBgcICQoL","ciphertext":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"}`

// TestGoldenSlot: kleidi reads this form of a keyslot for ever.
func TestGoldenSlot(t *testing.T) {
	d, err := parseSlot(seal.Slot{Type: seal.TypePKCS11, Data: []byte(goldenSlot)})
	if err != nil {
		t.Fatal(err)
	}
	s, err := d.slot()
	if err != nil || string(s.Data) != goldenSlot {
		t.Errorf("%s, %v", s.Data, err)
	}
}

// TestWhoseSlot: keys are compared by their IDs, or by their labels if one has no ID.
func TestWhoseSlot(t *testing.T) {
	for _, row := range []struct {
		config keyMatch
		slot   keyName
		want   bool
	}{
		{keyMatch{label: "a"}, keyName{Label: "a"}, true},
		{keyMatch{label: "a"}, keyName{Label: "b"}, false},
		{keyMatch{label: "a"}, keyName{Label: "b", ID: hexID{1}}, true}, // renamed, perhaps: the token tells
		{keyMatch{id: []byte{1}}, keyName{Label: "b", ID: hexID{1}}, true},
		{keyMatch{label: "b", id: []byte{2}}, keyName{Label: "b", ID: hexID{1}}, false},
		{keyMatch{id: []byte{2}}, keyName{Label: "b"}, true},
	} {
		if got := row.config.mayMatch(row.slot); got != row.want {
			t.Errorf("%v, slot of %+v: %v", row.config, row.slot, got)
		}
	}
}

func FuzzParseSlot(f *testing.F) {
	f.Add([]byte(goldenSlot))
	f.Add([]byte(strings.Replace(goldenSlot, "aes-gcm", "aes-kwp", 1)))
	f.Add([]byte(`{"form":"pkcs11-v1","form":"pkcs11-v1"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := parseSlot(seal.Slot{Type: seal.TypePKCS11, Data: data})
		if err != nil {
			if seal.CauseOf(err) != seal.CauseSlotCorrupt || len(err.Error()) > 1000 {
				t.Errorf("%v", err)
			}
			return
		}
		s, err := d.slot()
		if err != nil {
			t.Fatalf("what was read can't be written: %v", err)
		}
		again, err := parseSlot(s)
		if err != nil {
			t.Fatalf("%s: %v", s.Data, err)
		}
		if second, err := again.slot(); err != nil || string(second.Data) != string(s.Data) {
			t.Errorf("%s became %s: %v", s.Data, second.Data, err)
		}
	})
}
