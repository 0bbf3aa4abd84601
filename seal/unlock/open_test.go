package unlock_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// TestFallbackWithoutASlot: the second wrapper is a fallback even if the first one has
// no slot for this node, as after a renaming.
func TestFallbackWithoutASlot(t *testing.T) {
	n := newNode(t)
	second := n.fallback()
	n.makeWith(second)
	n.mustOpen()
	s := n.State()
	if s.Wrapper != "vault" {
		t.Errorf("%+v", s)
	}
	wantRefusal(t, s.Fallback, seal.CauseNoSlot, "the keyring holds no tpm slot for this node", "set node to its former name")
	second.set(seal.Errorf(seal.CauseUnavailable, "wait", "away"))
	n.restart()
	wantRefusal(t, n.Unlock(ctx), seal.CauseUnavailable, "away") // the wrapper with a slot is the one to repair
	second.set(nil)
	n.cfg.Wrappers = []seal.Wrapper{second, n.wrapper}
	n.restart()
	n.mustOpen()
	if s := n.State(); s.Fallback != nil {
		t.Errorf("the first one opened it: %v", s.Fallback)
	}
}

// TestFirstIsNoFallback: an ungated first wrapper is no fallback, whatever the gate says.
func TestFirstIsNoFallback(t *testing.T) {
	n := newNode(t)
	n.makeWith(n.wrapper, n.fallback())
	n.cfg.Ungated = func(string) bool { return true }
	n.gate.set(seal.Errorf(seal.CauseBootPolicy, "x", "another boot"))
	n.restart()
	n.mustOpen()
	if s := n.State(); s.Wrapper != "tpm" || s.Fallback != nil {
		t.Errorf("%+v", s)
	}
}

// TestReadyIsNeverOverruled: while Ready fails, no KEK is opened, not even by an ungated
// wrapper: the process's memory could be swapped out.
func TestReadyIsNeverOverruled(t *testing.T) {
	n := newNode(t)
	n.make()
	var unready error = seal.Errorf(seal.CauseMemory, "raise it", "no memory can be locked")
	n.cfg.Ungated = func(string) bool { return true }
	n.cfg.Ready = func() error { return unready }
	n.restart()
	wantRefusal(t, n.Unlock(ctx), seal.CauseMemory, "no memory can be locked")
	wantSteps(t, n.steps.take()) // no slot was opened
	unready = nil
	n.mustOpen()
}

// TestOnlyTheEpochIsTriedAgain: if only Settle has failed, the retries open no slot: it
// may be a token's.
func TestOnlyTheEpochIsTriedAgain(t *testing.T) {
	n := newNode(t)
	n.make()
	log := records{slog.DiscardHandler, make(chan struct{}, 100)}
	n.cfg.Log = slog.New(log)
	n.restart()
	n.settle.set(seal.Errorf(seal.CauseUnavailable, "wait", "no TPM"))
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { n.Run(ctx) })
	n.until("two attempts", log, func() bool { return n.State().Attempts >= 2 })
	n.settle.set(nil)
	n.until("all is well", log, func() bool { return n.State().Problem == nil })
	cancel()
	running.Wait()
	if steps := n.steps.take(); len(slices.DeleteFunc(steps, func(s string) bool { return s != "slot tpm" })) != 1 {
		t.Errorf("slots were opened %q", steps)
	}
}

// suspended is a refusal of the gate that lets slots with this text be tried.
type suspended struct {
	error
	text string
}

func (s suspended) Unwrap() error { return s.error }

func (s suspended) Overrules(slot seal.Slot) bool {
	return bytes.Contains(slot.Data, []byte(s.text))
}

// TestOverruledGate: a suspension opens its own slot although the boot policy refuses
// the boot. No other slot of the TPM is tried, although it would open.
func TestOverruledGate(t *testing.T) {
	n := newNode(t)
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	k, err := keyring.New(seal.ClusterID{1}, kek, []seal.Slot{n.wrapper.slot(kek, " present"), n.wrapper.slot(kek, " suspension")}, nil, now)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	n.put(k.Marshal())
	if err := n.anchor.Save(ctx, k.Anchor()); err != nil {
		t.Fatal(err)
	}
	refused := seal.Errorf(seal.CauseBootPolicy, "x", "another kernel")
	n.gate.set(suspended{refused, " suspension"})

	n.wrapper.verdicts[" suspension"] = seal.Errorf(seal.CauseBootState, "x", "the suspension is over")
	n.steps.take()
	wantRefusal(t, n.Unlock(ctx), seal.CauseBootPolicy, "another kernel", "the suspension is over")
	wantSteps(t, n.steps.take(), "gate", "slot tpm suspension")

	delete(n.wrapper.verdicts, " suspension")
	if err := n.Unlock(ctx); err != nil {
		t.Fatal(err)
	}
	wantSteps(t, n.steps.take(), "gate", "slot tpm suspension", "anchor 1", "settle while nothing is announced")
}

// TestPermanentFailuresAreNotTriedAgain: a failure that only a restart or another
// configuration repairs is not an outage. A fallback that can't be reached is an outage.
func TestPermanentFailuresAreNotTriedAgain(t *testing.T) {
	lasting := &seal.Error{Cause: seal.CauseConfiguration, Hint: "set tpm.bank", Permanent: true, Err: errors.New("no such bank")}
	away := seal.Errorf(seal.CauseUnavailable, "wait", "away")
	for name, c := range map[string]struct {
		gate, fallback error
		again          bool
	}{
		"permanent":                       {lasting, nil, false},
		"permanent, reworded":             {seal.AddHint(lasting, "or so"), nil, false},
		"an outage":                       {away, nil, true},
		"permanent, and a fallback away":  {lasting, away, true},
		"permanent, and so is a fallback": {lasting, lasting, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNode(t)
				second := n.fallback()
				n.makeWith(n.wrapper, second)
				n.cfg.Ungated = func(kind string) bool { return kind == second.Type() }
				second.set(c.fallback)
				if c.fallback == nil {
					n.cfg.Wrappers = []seal.Wrapper{n.wrapper}
				}
				n.gate.set(c.gate)
				n.restart()
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				go n.Run(ctx)
				time.Sleep(time.Hour)
				s := n.State()
				if s.Attempts > 1 != c.again || s.Next.IsZero() == c.again || s.Problem == nil {
					t.Errorf("%d attempts in an hour, the next at %v: %v", s.Attempts, s.Next, s.Problem)
				}
				n.Nudge()
				synctest.Wait()
				if now := n.State().Attempts; now != s.Attempts+1 {
					t.Errorf("%d attempts after a nudge, %d before", now, s.Attempts)
				}
				n.gate.set(nil)
				second.set(nil)
				n.Nudge()
				synctest.Wait()
				if !n.State().Open {
					t.Errorf("%+v", n.State())
				}
			})
		})
	}
}
