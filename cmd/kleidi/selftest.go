package main

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
)

// A way back that has rotted is found before it is needed: serve opens the slots of
// secondary wrappers now and then.

// selfTests is what came of the last tests of slots. A result is kept with the slot
// that it is of: one that is made anew, or taken away, leaves no result behind.
type selfTests struct {
	mu      sync.Mutex
	at      time.Time // of the last one of all slots
	results map[string]admin.SlotTest
}

// identity tells slots apart by all that they are.
func identity(s seal.Slot) string { return s.Type + "\x00" + s.Node + "\x00" + string(s.Data) }

// record keeps the result of a test of a slot, and drops those of slots that are not
// open any more. It asks for these itself: the keyring of when the test began may lack
// a slot that was added, and tested, since.
func (r *selfTests) record(open func() []seal.Slot, s seal.Slot, t admin.SlotTest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	kept := map[string]admin.SlotTest{identity(s): t}
	for _, other := range open() {
		if t, ok := r.results[identity(other)]; ok && identity(other) != identity(s) {
			kept[identity(other)] = t
		}
	}
	r.results = kept
}

// ended says that all slots were tested.
func (r *selfTests) ended(at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.at = at
}

// seconds is when all slots were last tested, 0 if never.
func (r *selfTests) seconds() float64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.at.IsZero() {
		return 0
	}
	return seconds(r.at)
}

// failed returns the tests of these slots that failed.
func (r *selfTests) failed(slots []seal.Slot) (failed []admin.SlotTest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, name := range slotNames(slots) {
		if t, ok := r.results[identity(slots[i])]; ok && !t.Opens {
			t.Name = name // which depends on what stands beside it
			failed = append(failed, t)
		}
	}
	return failed
}

// unusable returns what the self-test found of the slots that are there now, and the
// places without a slot, which nothing opens.
func (n *node) unusable(k *keyring.Keyring) []admin.SlotTest {
	slots := n.places(k.Slots())
	failed := n.tests.failed(slots)
	for i, name := range slotNames(slots) {
		if d, ok := skippedBy(slots[i]); ok {
			failed = append(failed, admin.SlotTest{Name: name, Problem: admin.ProblemOf(n.missing(d, slots))})
		}
	}
	return failed
}

// secondary reports whether the self-test opens a slot: one of a wrapper beside the
// TPM's, alone or together with the TPM in the running boot.
func (n *node) secondary(s seal.Slot) bool {
	return s.Type == seal.TypePKCS11 || s.Type == seal.TypeVault || twoOfTwo(s.Type) != "" && n.use(s) == uses[tpm.UsePresent]
}

// selfTest tests now and then until ctx ends: first a while after the start, then
// as often as configured, give or take a tenth, so that nodes don't all ask at once.
func (s *server) selfTest(ctx context.Context) {
	every := s.node.cfg.Unlock.SelfTest
	if every == 0 || s.node.hsm == nil && s.node.vault == nil {
		return
	}
	wait := every / 10
	for {
		if !pause(ctx, wait+rand.N(every/10+1)) || !s.awaitOpen(ctx, min(every/60, time.Minute)) {
			return
		}
		wait = every * 9 / 10
		s.testSecondary(ctx)
	}
}

// pause waits, and reports whether ctx goes on.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// awaitOpen waits until the keyring is open, which it sees within that time: a test
// that is due while kleidi is locked is not put off until the next one.
func (s *server) awaitOpen(ctx context.Context, within time.Duration) bool {
	for said := false; ; said = true {
		if _, err := s.node.unlocker.Keyring(); err == nil {
			return ctx.Err() == nil
		}
		if !said {
			s.node.log.Info("self-test: due, and waits until the keyring is open")
		}
		if !pause(ctx, within/2+rand.N(within/2+1)) {
			return false
		}
	}
}

// testSecondary opens the slots of the wrappers beside the TPM's, and says what is
// wrong with them.
func (s *server) testSecondary(ctx context.Context) {
	k, err := s.node.unlocker.Keyring()
	if err != nil {
		return
	}
	slots := k.Slots()
	at, tested := time.Now(), 0
	for i, name := range slotNames(slots) {
		if !s.node.secondary(slots[i]) {
			continue
		}
		tested++
		for _, w := range s.node.testSlot(ctx, k, name, slots[i]).Warnings {
			s.node.log.Warn("self-test", "slot", name, "warning", w)
		}
	}
	if tested > 0 {
		s.node.tests.ended(at)
	}
	if k, err = s.node.unlocker.Keyring(); err != nil {
		return
	}
	for _, t := range s.node.unusable(k) {
		s.node.log.Warn("self-test: a slot does not open", "slot", t.Name, "cause", t.Problem.Cause, "error", t.Problem.Err())
	}
}
