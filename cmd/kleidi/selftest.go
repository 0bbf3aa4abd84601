package main

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
)

// A way back that has rotted is found before it is needed: serve opens the slots of
// secondary wrappers now and then.

// selfTests is what came of the last self-test.
type selfTests struct {
	at    time.Time
	tests []admin.SlotTest
}

// seconds is when it was, 0 if never.
func (r selfTests) seconds() float64 {
	if r.at.IsZero() {
		return 0
	}
	return seconds(r.at)
}

// failed counts the slots that did not open.
func (r selfTests) failed() (n int) {
	for _, t := range r.tests {
		if !t.Opens {
			n++
		}
	}
	return n
}

// selfTest tests now and then until ctx ends: first a while after the start, then
// as often as configured, give or take a tenth, so that nodes don't all ask at once.
func (s *server) selfTest(ctx context.Context) {
	every := s.cfg.Unlock.SelfTest
	if every == 0 || s.hsm == nil && s.vault == nil {
		return
	}
	wait := every / 10
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait + rand.N(every/10+1)):
		}
		wait = every * 9 / 10
		s.testSecondary(ctx)
	}
}

// testSecondary opens the slots of the wrappers beside the TPM's, and says what is
// wrong with them.
func (s *server) testSecondary(ctx context.Context) {
	k, err := s.unlocker.Keyring()
	if err != nil {
		return
	}
	slots := k.Slots()
	r := selfTests{at: time.Now()}
	for i, name := range slotNames(slots) {
		if t := slots[i].Type; t != seal.TypePKCS11 && t != seal.TypeVault && t != typeSkipped && (twoOfTwo(t) == "" || s.use(slots[i]) != uses[tpm.UsePresent]) {
			continue
		}
		t := s.testSlot(ctx, k, name, slots[i])
		r.tests = append(r.tests, t)
		if !t.Opens {
			s.log.Warn("self-test: a slot does not open", "slot", name, "cause", t.Problem.Cause, "error", t.Problem.Err())
		}
		for _, w := range t.Warnings {
			s.log.Warn("self-test", "slot", name, "warning", w)
		}
	}
	if len(r.tests) > 0 {
		s.tests.Store(&r)
	}
}
