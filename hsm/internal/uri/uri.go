// Package uri reads PKCS#11 URIs (RFC 7512).
package uri

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
)

// maxURI is the maximum size of a PKCS#11 URI in bytes.
const maxURI = 4096

// URI holds the attributes of a PKCS#11 URI (RFC 7512) that kleidi uses.
type URI struct {
	Token, Serial, Manufacturer, Model string
	SlotID                             *uint
	Object                             string
	ID                                 []byte
	Class                              string // "secret-key", "private" or ""
	ModulePath                         string
	PINFile                            string
}

// pathAttributes are the attributes of the path of a URI, and what each sets.
var pathAttributes = map[string]func(u *URI, v string) error{
	"token":        func(u *URI, v string) error { u.Token = v; return nil },
	"serial":       func(u *URI, v string) error { u.Serial = v; return nil },
	"manufacturer": func(u *URI, v string) error { u.Manufacturer = v; return nil },
	"model":        func(u *URI, v string) error { u.Model = v; return nil },
	"object":       func(u *URI, v string) error { u.Object = v; return nil },
	"id":           func(u *URI, v string) error { u.ID = []byte(v); return nil },
	"type":         (*URI).setClass,
	"slot-id":      (*URI).setSlotID,
}

// queryAttributes are the attributes of the query of a URI.
var queryAttributes = map[string]func(u *URI, v string) error{
	"module-path": (*URI).setModulePath,
	"pin-source":  (*URI).setPINSource,
	"pin-value": func(*URI, string) error {
		return errors.New("a PIN does not belong in a configuration; put it into a file of mode 0600 and name that file with pinFile")
	},
	"module-name": func(*URI, string) error {
		return errors.New("kleidi does not search for modules by name; write module-path=/absolute/path")
	},
}

// Parse parses a PKCS#11 URI. An unknown attribute is an error, because to ignore it
// could make more tokens and keys match. Errors do not quote values, because someone may
// have put a PIN there.
func Parse(s string) (*URI, error) {
	scheme, rest, ok := strings.Cut(s, ":")
	if !ok || !strings.EqualFold(scheme, "pkcs11") || len(s) > maxURI { // a scheme has no case (RFC 3986, 3.1)
		return nil, fmt.Errorf("the PKCS#11 URI does not begin with pkcs11:, or has more than %d bytes; see RFC 7512", maxURI)
	}
	path, query, _ := strings.Cut(rest, "?")
	u := &URI{}
	if err := u.parse(path, ";", pathAttributes); err != nil {
		return nil, err
	}
	if err := u.parse(query, "&", queryAttributes); err != nil {
		return nil, err
	}
	return u, nil
}

func (u *URI) parse(part, separator string, known map[string]func(*URI, string) error) error {
	if part == "" {
		return nil
	}
	seen := map[string]bool{}
	for attribute := range strings.SplitSeq(part, separator) {
		name, escaped, ok := strings.Cut(attribute, "=")
		set := known[name]
		if !ok || set == nil {
			return fmt.Errorf("the PKCS#11 URI has an attribute that kleidi doesn't use, %.40q; leave it out", name)
		}
		if seen[name] {
			return fmt.Errorf("the PKCS#11 URI says %s= twice; say it once", name)
		}
		seen[name] = true
		value, err := url.PathUnescape(escaped)
		if err != nil {
			return fmt.Errorf("the PKCS#11 URI's %s= has a malformed %%-escape; write two hexadecimal digits after each %%", name)
		}
		if name != "id" && (!utf8.ValidString(value) || strings.ContainsRune(value, 0)) {
			return fmt.Errorf("the PKCS#11 URI's %s= is not UTF-8 text; correct it", name)
		}
		if value == "" {
			return fmt.Errorf("the PKCS#11 URI's %s= is empty; leave it out", name)
		}
		if err := set(u, value); err != nil {
			return fmt.Errorf("the PKCS#11 URI's %s=: %w", name, err)
		}
	}
	return nil
}

func (u *URI) setClass(v string) error {
	if v != keyslot.ClassSecret && v != keyslot.ClassPrivate {
		return fmt.Errorf("want %s (AES) or %s (RSA)", keyslot.ClassSecret, keyslot.ClassPrivate)
	}
	u.Class = v
	return nil
}

func (u *URI) setSlotID(v string) error {
	n, err := strconv.ParseUint(v, 10, 32)
	if err != nil {
		return errors.New("want a number; pkcs11-tool --list-slots shows them")
	}
	id := uint(n)
	u.SlotID = &id
	return nil
}

func (u *URI) setModulePath(v string) error {
	if !filepath.IsAbs(v) {
		return errors.New("want an absolute path")
	}
	u.ModulePath = v
	return nil
}

// setPINSource accepts file:/path, file:///path and /path. RFC 7512 also allows a program
// after a pipe sign, which kleidi does not run.
func (u *URI) setPINSource(v string) error {
	path := v
	if scheme, rest, ok := strings.Cut(v, ":"); ok && strings.EqualFold(scheme, "file") {
		path = strings.TrimPrefix(rest, "//")
	}
	if !filepath.IsAbs(path) {
		return errors.New("want file:/absolute/path; kleidi reads and runs nothing else")
	}
	u.PINFile = path
	return nil
}
