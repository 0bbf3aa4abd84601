package vault

import (
	"encoding/json"
	"fmt"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/vault/internal/transitslot"
)

func (c Config) slot(ciphertext string) (seal.Slot, error) {
	if _, err := transitslot.Version(ciphertext); err != nil {
		return seal.Slot{}, seal.Errorf(seal.CauseUnavailable, hintNotVault, "vault: the answer holds no ciphertext: %w", err)
	}
	data, err := json.Marshal(transitslot.Data{Format: transitslot.Format, Namespace: c.Namespace, Mount: c.Mount, Key: c.Key, Ciphertext: ciphertext})
	if err != nil {
		return seal.Slot{}, fmt.Errorf("vault: slot: %w", err)
	}
	return seal.Slot{Type: seal.TypeVault, Data: data}, nil
}

// ciphertext returns the ciphertext in a slot. The error is seal.ErrNotMine if the slot
// names another key, mount or namespace than the configuration.
func (c Config) ciphertext(slot seal.Slot) (string, error) {
	data, err := transitslot.Parse(slot)
	if err != nil {
		return "", err
	}
	if data.Namespace != c.Namespace || data.Mount != c.Mount || data.Key != c.Key {
		return "", seal.ErrNotMine
	}
	return data.Ciphertext, nil
}

// Version returns the version of the Transit key that encrypted a slot, 1 or more. It
// does not ask the server. The error is seal.ErrNotMine if the slot has another type.
func Version(slot seal.Slot) (int, error) {
	data, err := transitslot.Parse(slot)
	if err != nil {
		return 0, err
	}
	return transitslot.Version(data.Ciphertext)
}
