package slotview

import (
	"fmt"

	"github.com/beezy-dev/kleidi/seal/keyring"
)

// MostRetired is the maximum number of retired KEKs in a keyring.
const MostRetired = keyring.MaxRetired

// ManyRetired is the number of retired KEKs from which on a rotation warns of the limit.
// A keyring that is rotated every week reaches the limit a year and three months later.
const ManyRetired = MostRetired * 3 / 4

// ReportRoom reports the number of retired KEKs in a keyring, once there are many.
func ReportRoom(k *keyring.Keyring) []string {
	n := len(k.Info().Retired)
	if n < ManyRetired {
		return nil
	}
	return []string{fmt.Sprintf("the keyring holds %d retired KEKs, of at most %d, and a rotation needs room for one: run kleidi prune KEYID for each one under which nothing is stored (kleidi usage counts the objects)", n, MostRetired)}
}
