package serve

import (
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/internal/slots"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
)

// selfTest tests regularly until ctx ends: first a while after the start, then as often
// as configured, or up to a tenth sooner, so that nodes don't all test at once.
func (s *Server) selfTest(ctx context.Context) {
	every := s.Node.Config.Unlock.SelfTest
	if every == 0 || !slices.ContainsFunc(s.Node.Wrappers(), func(w seal.Wrapper) bool { return slotview.IsSecondary(w.Type()) }) {
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

// awaitOpen waits until the keyring is open, and notices that within the given time. So
// a test that is due while kleidi is locked runs as soon as it opens.
func (s *Server) awaitOpen(ctx context.Context, within time.Duration) bool {
	for warned := false; ; warned = true {
		if _, err := s.Node.Unlocker.Keyring(); err == nil {
			return ctx.Err() == nil
		}
		if !warned {
			s.Node.Log.Info("self-test: due, waiting until the keyring is open")
		}
		if !pause(ctx, within/2+rand.N(within/2+1)) {
			return false
		}
	}
}

// testSecondary opens the slots of the wrappers other than the TPM's, and logs their
// faults.
func (s *Server) testSecondary(ctx context.Context) {
	k, err := s.Node.Unlocker.Keyring()
	if err != nil {
		return
	}
	present := k.Slots()
	at, tested := time.Now(), 0
	for i, name := range slotview.Names(present) {
		if !slots.SelfTested(s.Node, present[i]) {
			continue
		}
		tested++
		for _, w := range slots.TestOne(ctx, s.Node, k, name, present[i]).Warnings {
			s.Node.Log.Warn("self-test", "slot", name, "warning", w)
		}
	}
	if tested > 0 {
		s.Node.SelfTests.Ended(at)
	}
	if k, err = s.Node.Unlocker.Keyring(); err != nil {
		return
	}
	for _, t := range slots.Unusable(s.Node, k) {
		s.Node.Log.Warn("self-test: a slot does not open", "slot", t.Name, "cause", t.Problem.Cause, "error", t.Problem.Err())
	}
}
