package node

import (
	"sync"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
)

// SelfTests is what came of the last tests of slots. A result is kept with the slot
// that it is of: one that is made again, or taken away, leaves no result behind.
type SelfTests struct {
	mu      sync.Mutex
	at      time.Time // of the last one of all slots
	results map[string]admin.SlotTest
}

// Record keeps the result of a test of a slot, and drops those of slots that are not
// open any more. It asks for these itself: the keyring of when the test began may lack
// a slot that was added, and tested, since.
func (r *SelfTests) Record(open func() []seal.Slot, s seal.Slot, t admin.SlotTest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	kept := map[string]admin.SlotTest{slotview.Identity(s): t}
	for _, other := range open() {
		if t, ok := r.results[slotview.Identity(other)]; ok && slotview.Identity(other) != slotview.Identity(s) {
			kept[slotview.Identity(other)] = t
		}
	}
	r.results = kept
}

// Ended says that all slots were tested.
func (r *SelfTests) Ended(at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.at = at
}

// Seconds is when all slots were last tested, 0 if never.
func (r *SelfTests) Seconds() float64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.at.IsZero() {
		return 0
	}
	return Seconds(r.at)
}

// Failed returns the tests of these slots that failed.
func (r *SelfTests) Failed(slots []seal.Slot) (failed []admin.SlotTest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, name := range slotview.Names(slots) {
		if t, ok := r.results[slotview.Identity(slots[i])]; ok && !t.Opens {
			t.Name = name // which depends on what stands beside it
			failed = append(failed, t)
		}
	}
	return failed
}

func Seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }
