package hsm

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/seal"
)

// LegacyKeyLabel is the label of the AES key that the init container of kleidi 1.x made.
// That key has no CKA_ID.
const LegacyKeyLabel = "kleidi-kms-plugin"

// MaxLegacy is the maximum size of a config.json of kleidi 1.x in bytes.
const MaxLegacy = 64 << 10

// ErrLegacyVault says that a config.json of kleidi 1.x is that of Vault.
var ErrLegacyVault = errors.New("this is kleidi 1.x's configuration of Vault, not of a PKCS#11 token: see docs/vault.md")

// ParseLegacy parses a config.json of kleidi 1.x: path, tokenLabel, tokenSerial or
// slotNumber, and pin. It returns a Config for that token and key, without the PIN, and
// the PIN, which belongs in a file of its own. The caller closes the PIN and clears b.
// As in kleidi 1.x, the case of the names does not matter, and other members are
// ignored.
func ParseLegacy(mem seal.Memory, b []byte) (Config, *seal.Secret, error) {
	if len(b) > MaxLegacy {
		return Config{}, nil, fmt.Errorf("config.json of kleidi 1.x: %d bytes, at most %d are read", len(b), MaxLegacy)
	}
	var old struct {
		Path        string
		TokenLabel  string
		TokenSerial string
		SlotNumber  *uint
		Pin         json.RawMessage
		// Those of its configuration of Vault, in the later and in the first form
		TransitKey, VaultRole, TransitPath, AuthMethod, Transit, Role string
	}
	err := json.Unmarshal(b, &old)
	defer clear(old.Pin)
	if err != nil {
		// The error of package json may quote the PIN
		return Config{}, nil, errors.New("config.json of kleidi 1.x: it is not a JSON object with path, tokenLabel and pin; see docs/pkcs11.md")
	}
	if old.Path == "" && old.TransitKey+old.VaultRole+old.TransitPath+old.AuthMethod != "" || old.Transit+old.Role != "" {
		return Config{}, nil, ErrLegacyVault
	}
	pin, err := legacyPIN(mem, old.Pin)
	if err != nil {
		return Config{}, nil, fmt.Errorf("config.json of kleidi 1.x: %w", err)
	}
	c := Config{Module: old.Path, TokenLabel: old.TokenLabel, TokenSerial: old.TokenSerial, SlotID: old.SlotNumber, KeyLabel: LegacyKeyLabel, Memory: mem}
	if _, err := c.resolve(); err != nil {
		_ = pin.Close()
		return Config{}, nil, fmt.Errorf("config.json of kleidi 1.x: %w", err)
	}
	if c.TokenLabel == "" && c.TokenSerial == "" && c.SlotID == nil {
		_ = pin.Close()
		return Config{}, nil, errors.New("config.json of kleidi 1.x: it names no token; add tokenLabel")
	}
	return c, pin, nil
}

// legacyPIN unquotes a JSON string without copying it to the heap. It refuses a string
// with escapes.
func legacyPIN(mem seal.Memory, quoted []byte) (*seal.Secret, error) {
	if len(quoted) < 2 || quoted[0] != '"' {
		return nil, errors.New("it has no pin, or its pin is not a string; write pin in quotes")
	}
	pin := quoted[1 : len(quoted)-1]
	for _, b := range pin {
		if b == '\\' {
			return nil, errors.New("its pin has an escaped character; put the PIN into a file of mode 0600 and set pkcs11.pinFile by hand")
		}
	}
	if len(pin) == 0 || len(pin) > maxPIN {
		return nil, fmt.Errorf("its pin does not have 1 to %d bytes; correct it", maxPIN)
	}
	return mem.Take(pin)
}
