package hsm

import (
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/hsm/internal/legacy"
	"github.com/beezy-dev/kleidi/seal"
)

const (
	// LegacyKeyLabel is the label of the AES key that the init container of kleidi 1.x made.
	// That key has no CKA_ID.
	LegacyKeyLabel = legacy.KeyLabel

	// MaxLegacy is the maximum size of a config.json of kleidi 1.x in bytes.
	MaxLegacy = legacy.Max
)

// ErrLegacyVault says that a config.json of kleidi 1.x configures Vault.
var ErrLegacyVault = legacy.ErrVault

// ParseLegacy parses a config.json of kleidi 1.x. It returns a Config for that token and
// key, without the PIN, and the PIN, which belongs in a file of its own. The caller closes
// the PIN and clears b.
func ParseLegacy(mem seal.Memory, b []byte) (Config, *seal.Secret, error) {
	old, pin, err := legacy.Parse(mem, b)
	if err != nil {
		return Config{}, nil, err
	}
	c := Config{Module: old.Module, TokenLabel: old.TokenLabel, TokenSerial: old.TokenSerial, SlotID: old.SlotID, KeyLabel: LegacyKeyLabel, Memory: mem}
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
