package hsm

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/seal"
)

// LegacyKeyLabel is the label of the AES key that the init container of kleidi 1.x
// made. Its CKA_ID is empty.
const LegacyKeyLabel = "kleidi-kms-plugin"

// MaxLegacy bounds a config.json of kleidi 1.x, in bytes.
const MaxLegacy = 64 << 10

// ParseLegacy reads the config.json of kleidi 1.x: path, tokenLabel, tokenSerial
// or slotNumber, and pin. It returns a configuration for that token and key,
// without a PIN, and the PIN, which the caller closes: it belongs into a file of
// its own. Letter case of the names is ignored, and what else the file says too,
// as kleidi 1.x did. The caller clears b.
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
	}
	err := json.Unmarshal(b, &old)
	defer clear(old.Pin)
	if err != nil {
		// The error of package json could quote what stands where a PIN belongs
		return Config{}, nil, errors.New("config.json of kleidi 1.x: it is no JSON object with path, tokenLabel and pin; see docs/pkcs11.md")
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

// legacyPIN unquotes a JSON string without a copy on the heap, unless it is escaped.
func legacyPIN(mem seal.Memory, quoted []byte) (*seal.Secret, error) {
	if len(quoted) < 2 || quoted[0] != '"' {
		return nil, errors.New("it has no pin, or one that is no string; write pin in quotes")
	}
	pin := quoted[1 : len(quoted)-1]
	for _, b := range pin {
		if b == '\\' {
			return nil, errors.New("its pin has an escaped character; put the PIN into a file of mode 0600 and set pkcs11.pinFile by hand")
		}
	}
	if len(pin) == 0 || len(pin) > maxPIN {
		return nil, fmt.Errorf("its pin has not 1 to %d bytes; correct it", maxPIN)
	}
	return mem.Take(pin)
}
