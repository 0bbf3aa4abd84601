package node

import (
	"testing"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
)

// TestRecord: the result of a test of one slot stays when another slot is tested, and
// disappears with its own slot.
func TestRecord(t *testing.T) {
	a, b := seal.Slot{Type: seal.TypePKCS11, Data: []byte("{}")}, seal.Slot{Type: seal.TypeVault, Data: []byte("{}")}
	open := []seal.Slot{a}
	var r SelfTests
	for _, step := range []struct {
		tested seal.Slot
		opens  bool
		open   []seal.Slot
		failed int
	}{
		{a, false, []seal.Slot{a, b}, 1},
		{b, false, []seal.Slot{a, b}, 2},
		{a, true, []seal.Slot{a, b}, 1}, // the test began before b was added
		{a, true, []seal.Slot{a}, 0},
		{a, true, []seal.Slot{a, b}, 0}, // b was removed
	} {
		open = step.open
		r.Record(func() []seal.Slot { return open }, step.tested, admin.SlotTest{Opens: step.opens})
		if got := len(r.Failed([]seal.Slot{a, b})); got != step.failed {
			t.Errorf("after a test of %s (opens: %t): %d failed, want %d", step.tested.Type, step.opens, got, step.failed)
		}
	}
}
