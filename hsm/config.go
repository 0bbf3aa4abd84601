package hsm

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// DefaultTimeout bounds an operation on the token where Config.Timeout is zero.
const DefaultTimeout = 20 * time.Second

// Limits of what names a token or a key, in bytes (PKCS#11 v2.40, 3.2 for tokens).
const (
	maxTokenLabel  = 32
	maxTokenSerial = 16
	maxKeyLabel    = 255
	maxKeyID       = 255
)

// Config says which key of which token wraps KEKs.
type Config struct {
	// Module is the absolute path of the PKCS#11 module, a shared library.
	Module string
	// InitArgs is handed to the module's C_Initialize (CK_C_INITIALIZE_ARGS.pReserved).
	// NSS softokn wants configdir='sql:/path'; nearly all others want none.
	InitArgs string
	// URI names token and key (RFC 7512). It may hold module-path and
	// pin-source=file:/path, never pin-value.
	URI string
	// TokenLabel, TokenSerial and SlotID name the token where URI doesn't. SlotID
	// is what some modules renumber at each start.
	TokenLabel  string
	TokenSerial string
	SlotID      *uint
	// KeyLabel (CKA_LABEL) and KeyID (CKA_ID) name the key where URI doesn't; at
	// least one of them must.
	KeyLabel string
	KeyID    []byte
	// PIN returns the user PIN; the wrapper closes it. It is called for each
	// operation. An error of it that is a [seal.Error] stays one. Where it is set,
	// neither PINFile nor the URI's pin-source may be.
	PIN func(context.Context) (*seal.Secret, error)
	// PINFile is the absolute path of a file with the PIN, which nobody but its
	// owner may read.
	PINFile string
	// PublicKey wraps for an RSA key without asking the token. Nil reads it from there.
	PublicKey *rsa.PublicKey
	// Timeout bounds an operation; zero is DefaultTimeout.
	Timeout time.Duration
	// Memory is where KEKs and PINs lie.
	Memory seal.Memory
	// Name is what messages call this wrapper; "" is pkcs11.
	Name string
}

// target is a Config, resolved: its URI read, its parts checked against each other.
type target struct {
	module, initArgs string
	token            tokenMatch
	key              keyMatch
	pin              func(context.Context) (*seal.Secret, error) // nil: none configured
	timeout          time.Duration
}

// tokenMatch says which token is meant. Empty fields match all.
type tokenMatch struct {
	label, serial, manufacturer, model string
	slotID                             *uint
}

// keyMatch says which key is meant. Empty fields match all.
type keyMatch struct {
	label string
	id    []byte
	class string // "secret-key", "private" or ""
}

// merge adds what more says; what both say must be the same.
func merge(into *string, more, setting, attribute string) error {
	if *into != "" && more != "" && *into != more {
		return fmt.Errorf("%s and the URI's %s differ; set one of them", setting, attribute)
	}
	if *into == "" {
		*into = more
	}
	return nil
}

// resolve reads all that can be wrong without asking the module.
func (c Config) resolve() (*target, error) {
	u := &uri{}
	if c.URI != "" {
		var err error
		if u, err = parseURI(c.URI); err != nil {
			return nil, err
		}
	}
	t := &target{module: c.Module, initArgs: c.InitArgs, timeout: c.Timeout,
		token: tokenMatch{c.TokenLabel, c.TokenSerial, u.manufacturer, u.model, c.SlotID},
		key:   keyMatch{c.KeyLabel, c.KeyID, u.class}}
	pinFile, id := c.PINFile, string(c.KeyID)
	if t.token.slotID == nil {
		t.token.slotID = u.slotID
	}
	err := errors.Join(
		merge(&t.module, u.modulePath, "module", "module-path"),
		merge(&t.token.label, u.token, "tokenLabel", "token"),
		merge(&t.token.serial, u.serial, "tokenSerial", "serial"),
		merge(&t.key.label, u.object, "keyLabel", "object"),
		merge(&id, string(u.id), "keyID", "id"),
		merge(&pinFile, u.pinFile, "pinFile", "pin-source"),
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
		if _, err := publicDigest(c.PublicKey); err != nil {
			return nil, fmt.Errorf("publicKey: %w", err)
		}
	}
	return t, t.check(pinFile, c.PIN != nil)
}

// check refuses what can't work. elsewhere says that the PIN comes from the program.
func (t *target) check(pinFile string, elsewhere bool) error {
	switch {
	case t.module == "":
		return errors.New("no PKCS#11 module is named; set module to its absolute path, /usr/lib/softhsm/libsofthsm2.so for instance")
	case !filepath.IsAbs(t.module):
		return fmt.Errorf("module %q is no absolute path; write it from the root on", t.module)
	case pinFile != "" && elsewhere:
		return errors.New("pinFile, or the URI's pin-source, names a PIN beside sealedPINFile; remove one of them")
	case pinFile != "" && !filepath.IsAbs(pinFile):
		return fmt.Errorf("pinFile %q is no absolute path; write it from the root on", pinFile)
	case t.key.label == "" && len(t.key.id) == 0:
		return errors.New("no key is named; set keyLabel, or add object=LABEL or id=%01 to uri")
	case len(t.token.label) > maxTokenLabel || len(t.token.serial) > maxTokenSerial:
		return fmt.Errorf("a token's label has at most %d bytes, its serial number %d; see what pkcs11-tool --list-slots shows", maxTokenLabel, maxTokenSerial)
	case len(t.key.label) > maxKeyLabel || len(t.key.id) > maxKeyID:
		return fmt.Errorf("a key's label has at most %d bytes here, its id %d; give it shorter ones", maxKeyLabel, maxKeyID)
	case t.timeout < 0:
		return fmt.Errorf("timeout %s is below zero; leave it out for %s", t.timeout, DefaultTimeout)
	}
	return nil
}

// pinSource returns nil where no PIN is configured.
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
		return func(context.Context) (*seal.Secret, error) { return ReadPIN(c.Memory, file) }
	}
	return nil
}
