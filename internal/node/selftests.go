package node

import (
	"sync"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
)

// SelfTests holds the results of the last tests of slots. A result belongs to its slot:
// a slot that is made again, or removed, leaves no result behind.
type SelfTests struct {
	mu      sync.Mutex
	at      time.Time // of the last test of all slots
	results map[string]admin.SlotTest
}

// Record keeps the result of a test of a slot, and drops the results of slots that are
// no longer open. It calls open itself, because a slot may have been added and tested
// since the test began.
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

// Seconds returns the time of the last test of all slots, or 0 if never.
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
			t.Name = name // the name depends on the other slots
			failed = append(failed, t)
		}
	}
	return failed
}

// Of returns the result of a slot, or nil.
func (r *SelfTests) Of(s seal.Slot) *admin.SlotTest {
	r.mu.Lock()
	defer r.mu.Unlock()
	if t, ok := r.results[slotview.Identity(s)]; ok {
		return &t
	}
	return nil
}

// Seconds returns t in seconds since 1970, for a metric.
func Seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }
