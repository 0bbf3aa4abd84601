package vault

import (
	"fmt"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/vault/internal/transitslot"
)

// Describe returns the Transit key that a slot names, in one line. It is untrusted.
func Describe(slot seal.Slot) string {
	d, err := transitslot.Parse(slot)
	if err != nil {
		return "unreadable"
	}
	v, err := transitslot.Version(d.Ciphertext)
	if err != nil {
		return "unreadable"
	}
	mount := d.Mount
	if d.Namespace != "" {
		mount = d.Namespace + "/" + mount
	}
	return fmt.Sprintf("key %s of %s, version %d", d.Key, mount, v)
}
