package hsm

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/beezy-dev/kleidi/hsm/internal/cryptoki"
	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/hsm/internal/pinfile"
	"github.com/beezy-dev/kleidi/hsm/internal/uri"
	"github.com/beezy-dev/kleidi/seal"
)

// DefaultTimeout is the timeout of an operation if Config.Timeout is zero.
const DefaultTimeout = 20 * time.Second

// Config names the key and the token that wrap KEKs.
type Config struct {
	// Module is the absolute path of the PKCS#11 module, a shared library.
	Module string
	// InitArgs is an argument of the module's C_Initialize
	// (CK_C_INITIALIZE_ARGS.pReserved). NSS softokn needs configdir='sql:/path'; nearly
	// all other modules need none.
	InitArgs string
	// URI names token and key (RFC 7512). It may have module-path and
	// pin-source=file:/path, but not pin-value.
	URI string
	// TokenLabel, TokenSerial and SlotID name the token if URI doesn't. SlotID is the
	// number of PKCS#11's slot, which some modules change at each start.
	TokenLabel  string
	TokenSerial string
	SlotID      *uint
	// KeyLabel (CKA_LABEL) and KeyID (CKA_ID) name the key if URI doesn't. At least one of
	// KeyLabel, KeyID and URI must name it.
	KeyLabel string
	KeyID    []byte
	// PIN returns the user PIN, which the wrapper closes. It is called for each
	// operation. If it returns a [*seal.Error], so does the operation. If PIN is set,
	// neither PINFile nor the URI's pin-source may be set.
	PIN func(context.Context) (*seal.Secret, error)
	// PINFile is the absolute path of a file with the PIN. Nobody but the owner of the
	// file may read it.
	PINFile string
	// PublicKey is the public part of an RSA key. With it, wrapping does not use the
	// token. If it is nil, it is read from the token.
	PublicKey *rsa.PublicKey
	// Timeout is the timeout of an operation. Zero means DefaultTimeout.
	Timeout time.Duration
	// Memory allocates the memory of KEKs and PINs.
	Memory seal.Memory
	// Name is the name of the wrapper in messages. If it is empty, the name is pkcs11.
	Name string
}

// target is a resolved Config: its URI is parsed, and its parts are checked against each
// other.
type target struct {
	module, initArgs string
	token            cryptoki.TokenMatch
	key              keyMatch
	pin              func(context.Context) (*seal.Secret, error) // nil if no PIN is configured
	timeout          time.Duration
}

// keyMatch selects the key. Empty fields match every key.
type keyMatch struct {
	label string
	id    []byte
	class string // "secret-key", "private" or ""
}

// merge sets *into to more if it is empty. If both are set, they must be the same.
func merge(into *string, more, setting, attribute string) error {
	if *into != "" && more != "" && *into != more {
		return fmt.Errorf("%s and the URI's %s differ; set one of them", setting, attribute)
	}
	if *into == "" {
		*into = more
	}
	return nil
}

// resolve makes every check that does not need the module.
func (c Config) resolve() (*target, error) {
	u := &uri.URI{}
	if c.URI != "" {
		var err error
		if u, err = uri.Parse(c.URI); err != nil {
			return nil, err
		}
	}
	t := &target{module: c.Module, initArgs: c.InitArgs, timeout: c.Timeout,
		token: cryptoki.TokenMatch{Label: c.TokenLabel, Serial: c.TokenSerial, Manufacturer: u.Manufacturer, Model: u.Model, SlotID: c.SlotID},
		key:   keyMatch{c.KeyLabel, c.KeyID, u.Class}}
	pinFile, id := c.PINFile, string(c.KeyID)
	if t.token.SlotID == nil {
		t.token.SlotID = u.SlotID
	}
	err := errors.Join(
		merge(&t.module, u.ModulePath, "module", "module-path"),
		merge(&t.token.Label, u.Token, "tokenLabel", "token"),
		merge(&t.token.Serial, u.Serial, "tokenSerial", "serial"),
		merge(&t.key.label, u.Object, "keyLabel", "object"),
		merge(&id, string(u.ID), "keyID", "id"),
		merge(&pinFile, u.PINFile, "pinFile", "pin-source"),
	)
	if err != nil {
		return nil, err
	}
	t.key.id = []byte(id)
	t.pin = c.pinSource(pinFile)
	if t.timeout == 0 {
		t.timeout = DefaultTimeout
	}
	if c.PublicKey != nil {
		if _, err := keyslot.PublicDigest(c.PublicKey); err != nil {
			return nil, fmt.Errorf("publicKey: %w", err)
		}
	}
	if pinFile != "" && c.PIN != nil {
		return nil, errors.New("pinFile, or the URI's pin-source, names a PIN beside sealedPINFile; remove one of them")
	}
	return t, t.check(pinFile)
}

// check refuses settings that can't work.
func (t *target) check(pinFile string) error {
	switch {
	case t.module == "":
		return errors.New("no PKCS#11 module is named; set module to its absolute path, /usr/lib/softhsm/libsofthsm2.so for instance")
	case !filepath.IsAbs(t.module):
		return fmt.Errorf("module %q is not an absolute path; write the whole path, beginning with /", t.module)
	case pinFile != "" && !filepath.IsAbs(pinFile):
		return fmt.Errorf("pinFile %q is not an absolute path; write the whole path, beginning with /", pinFile)
	case t.key.label == "" && len(t.key.id) == 0:
		return errors.New("no key is named; set keyLabel, or add object=LABEL or id=%01 to uri")
	case len(t.token.Label) > keyslot.MaxTokenLabel || len(t.token.Serial) > keyslot.MaxTokenSerial:
		return fmt.Errorf("a token's label has at most %d bytes, its serial number %d; see what pkcs11-tool --list-slots shows", keyslot.MaxTokenLabel, keyslot.MaxTokenSerial)
	case len(t.key.label) > keyslot.MaxKeyLabel || len(t.key.id) > keyslot.MaxKeyID:
		return fmt.Errorf("a key's label has at most %d bytes here, its id %d; give it shorter ones", keyslot.MaxKeyLabel, keyslot.MaxKeyID)
	case t.timeout < 0:
		return fmt.Errorf("timeout %s is below zero; leave it out for %s", t.timeout, DefaultTimeout)
	}
	return nil
}

// pinSource returns a function that reads the PIN, or nil if none is configured.
func (c Config) pinSource(file string) func(context.Context) (*seal.Secret, error) {
	switch {
	case c.PIN != nil:
		return func(ctx context.Context) (*seal.Secret, error) {
			s, err := c.PIN(ctx)
			if err != nil && seal.CauseOf(err) == "" {
				err = seal.Errorf(seal.CauseCredentials, "see pkcs11.sealedPINFile", "get the PIN: %w", err)
			}
			return s, err
		}
	case file != "":
		return func(context.Context) (*seal.Secret, error) { return pinfile.Read(c.Memory, file) }
	}
	return nil
}

// mayMatch reports whether the key that a keyslot names may be the configured one.
func (k keyMatch) mayMatch(name keyslot.KeyName) bool {
	if len(k.id) > 0 && len(name.ID) > 0 {
		return string(k.id) == string(name.ID)
	}
	return k.label == "" || name.Label == "" || len(name.ID) > 0 || k.label == name.Label
}

// ReadPIN reads a PIN of 1 to 255 bytes from the first line of a file that only its owner
// may read. Its errors have the cause [seal.CauseCredentials] and do not quote the file.
func ReadPIN(mem seal.Memory, path string) (*seal.Secret, error) { return pinfile.Read(mem, path) }
