package hsm

import (
	"fmt"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

// Describe returns the key, the token and the mechanism that a keyslot names, in one line.
// They are untrusted.
func Describe(slot seal.Slot) string {
	d, err := keyslot.Parse(slot)
	if err != nil {
		return "unreadable"
	}
	key := fmt.Sprintf("%q", d.Key.Label)
	if d.Key.Label == "" {
		key = fmt.Sprintf("%x", []byte(d.Key.ID))
	}
	return fmt.Sprintf("key %s of token %q (serial %q), %s", key, d.Token.Label, d.Token.Serial, d.Mechanism)
}
