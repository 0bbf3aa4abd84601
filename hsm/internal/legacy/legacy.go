// Package legacy reads the configuration of kleidi 1.x for a PKCS#11 token.
package legacy

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/hsm/internal/pinfile"
	"github.com/beezy-dev/kleidi/seal"
)

// KeyLabel is the label of the AES key that the init container of kleidi 1.x made.
// That key has no CKA_ID.
const KeyLabel = "kleidi-kms-plugin"

// Max is the maximum size of a config.json of kleidi 1.x in bytes.
const Max = 64 << 10

// ErrVault says that a config.json of kleidi 1.x configures Vault.
var ErrVault = errors.New("this is kleidi 1.x's configuration of Vault, not of a PKCS#11 token: see docs/vault.md")

// Config is what a config.json of kleidi 1.x says of the token.
type Config struct {
	Module, TokenLabel, TokenSerial string
	SlotID                          *uint
}

// Parse parses a config.json of kleidi 1.x: path, tokenLabel, tokenSerial or slotNumber,
// and pin. The caller closes the PIN and clears b. As in kleidi 1.x, the case of the
// names does not matter, and other members are ignored.
func Parse(mem seal.Memory, b []byte) (Config, *seal.Secret, error) {
	if len(b) > Max {
		return Config{}, nil, fmt.Errorf("config.json of kleidi 1.x: %d bytes, at most %d are read", len(b), Max)
	}
	var old struct {
		Path        string
		TokenLabel  string
		TokenSerial string
		SlotNumber  *uint
		Pin         json.RawMessage
		// The members of its Vault configuration, in the later and in the first form
		TransitKey, VaultRole, TransitPath, AuthMethod, Transit, Role string
	}
	err := json.Unmarshal(b, &old)
	defer clear(old.Pin)
	if err != nil {
		// The error of package json may quote the PIN
		return Config{}, nil, errors.New("config.json of kleidi 1.x: it is not a JSON object with path, tokenLabel and pin; see docs/pkcs11.md")
	}
	if old.Path == "" && old.TransitKey+old.VaultRole+old.TransitPath+old.AuthMethod != "" || old.Transit+old.Role != "" {
		return Config{}, nil, ErrVault
	}
	p, err := pin(mem, old.Pin)
	if err != nil {
		return Config{}, nil, fmt.Errorf("config.json of kleidi 1.x: %w", err)
	}
	return Config{Module: old.Path, TokenLabel: old.TokenLabel, TokenSerial: old.TokenSerial, SlotID: old.SlotNumber}, p, nil
}

// pin unquotes a JSON string without copying it to the heap. It refuses a string
// with escapes.
func pin(mem seal.Memory, quoted []byte) (*seal.Secret, error) {
	if len(quoted) < 2 || quoted[0] != '"' {
		return nil, errors.New("it has no pin, or its pin is not a string; write pin in quotes")
	}
	text := quoted[1 : len(quoted)-1]
	for _, b := range text {
		if b == '\\' {
			return nil, errors.New("its pin has an escaped character; put the PIN into a file of mode 0600 and set pkcs11.pinFile by hand")
		}
	}
	if len(text) == 0 || len(text) > pinfile.MaxPIN {
		return nil, fmt.Errorf("its pin does not have 1 to %d bytes; correct it", pinfile.MaxPIN)
	}
	return mem.Take(text)
}
