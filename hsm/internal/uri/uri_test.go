package uri

import (
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
)

func TestParse(t *testing.T) {
	three := uint(3)
	for s, want := range map[string]URI{
		"pkcs11:": {},
		"pkcs11:token=My%20token;object=kek;id=%01%ff;type=secret-key":         {Token: "My token", Object: "kek", ID: []byte{1, 0xff}, Class: keyslot.ClassSecret},
		"pkcs11:serial=1;manufacturer=m;model=o;slot-id=3;type=private":        {Serial: "1", Manufacturer: "m", Model: "o", SlotID: &three, Class: keyslot.ClassPrivate},
		"pkcs11:object=a&b?module-path=/usr/lib/m.so&pin-source=file:/etc/pin": {Object: "a&b", ModulePath: "/usr/lib/m.so", PINFile: "/etc/pin"},
		"pkcs11:object=k?pin-source=file:///etc/pin":                           {Object: "k", PINFile: "/etc/pin"},
		"PKCS11:object=k":                          {Object: "k"},
		"Pkcs11:object=k?pin-source=FILE:/etc/pin": {Object: "k", PINFile: "/etc/pin"},
		"pkcs11:object=k?pin-source=/etc/pin":      {Object: "k", PINFile: "/etc/pin"},
		"pkcs11:model=SoftHSM%20v2;manufacturer=SoftHSM%20project;serial=ab;token=t;id=%61": {Model: "SoftHSM v2", Manufacturer: "SoftHSM project", Serial: "ab", Token: "t", ID: []byte("a")},
	} {
		if got, err := Parse(s); err != nil || !reflect.DeepEqual(*got, want) {
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
		_, err := Parse(s)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), secret) {
			t.Errorf("%.80s: %v, want %q", s, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"pkcs11:", "pkcs11:token=t;object=k;id=%01;type=private;slot-id=1?module-path=/m&pin-source=file:/p", "pkcs11:id=%", "pkcs11:a=b?pin-value=1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := Parse(s)
		if err != nil {
			if len(err.Error()) > 400 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		if u.ModulePath != "" && !filepath.IsAbs(u.ModulePath) || u.PINFile != "" && !filepath.IsAbs(u.PINFile) {
			t.Errorf("%q: a relative path", s)
		}
	})
}
