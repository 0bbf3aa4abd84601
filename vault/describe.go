package vault

import (
	"fmt"

	"github.com/beezy-dev/kleidi/seal"
)

// Describe says in one line which Transit key a slot names. Nothing vouches for it.
func Describe(slot seal.Slot) string {
	d, err := parseSlot(slot)
	if err != nil {
		return "unreadable"
	}
	v, err := version(d.Ciphertext)
	if err != nil {
		return "unreadable"
	}
	where := d.Mount
	if d.Namespace != "" {
		where = d.Namespace + "/" + where
	}
	return fmt.Sprintf("key %s of %s, version %d", d.Key, where, v)
}
