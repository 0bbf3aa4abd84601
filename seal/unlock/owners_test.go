package unlock

import (
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// TestOwnersArePrintableAndBounded: the list of slots quotes a keyring that nothing
// authenticates.
func TestOwnersArePrintableAndBounded(t *testing.T) {
	var slots []seal.Slot
	for range 100 {
		slots = append(slots, seal.Slot{Type: seal.TypeTPM, Node: "cp\x1b[2J\n-> run this"})
	}
	if got := owners(slots); len([]rune(got)) > maxOwners+1 || strings.ContainsAny(got, "\x1b\n") {
		t.Errorf("%q", got)
	}
}
