package hsm

import (
	"fmt"

	"github.com/beezy-dev/kleidi/seal"
)

// Describe says in one line which key of which token a slot names, and by which
// mechanism it wraps. Nothing vouches for it.
func Describe(slot seal.Slot) string {
	d, err := parseSlot(slot)
	if err != nil {
		return "unreadable"
	}
	key := fmt.Sprintf("%q", d.Key.Label)
	if d.Key.Label == "" {
		key = fmt.Sprintf("%x", []byte(d.Key.ID))
	}
	return fmt.Sprintf("key %s of token %q (serial %q), %s", key, d.Token.Label, d.Token.Serial, d.Mechanism)
}
