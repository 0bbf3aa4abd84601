package unlock_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"syscall"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/sealtest"
)

// logs makes the node write its log to the buffer.
func (n *node) logs() *bytes.Buffer {
	log := new(bytes.Buffer)
	n.cfg.Log = slog.New(slog.NewTextHandler(log, nil))
	n.restart()
	return log
}

// TestFallbackIsLogged: an operator learns from the log that a fallback opened the
// keyring, and why the wrappers before it did not.
func TestFallbackIsLogged(t *testing.T) {
	n := newNode(t)
	n.makeWith(n.wrapper, n.fallback())
	log := n.logs()
	n.wrapper.set(seal.Errorf(seal.CauseEpoch, "recover", "revoked"))
	n.mustOpen()
	if text := log.String(); !strings.Contains(text, "level=WARN") || !strings.Contains(text, "opened by a fallback") || !strings.Contains(text, "cause=epoch-passed") {
		t.Errorf("the log is %s", text)
	}
}

// TestOverruledGateIsNoFallback: the slot of a suspension opens the keyring in the
// regular way, although the gate refuses, and the log says so. An ungated wrapper that
// opens it instead is a fallback.
func TestOverruledGateIsNoFallback(t *testing.T) {
	n := newNode(t)
	second := n.fallback()
	n.makeWith(n.wrapper, second)
	n.cfg.Ungated = func(kind string) bool { return kind == second.name }
	log := n.logs()
	n.gate.set(suspended{seal.Errorf(seal.CauseBootPolicy, "x", "another kernel"), `"kek"`}) // in every slot
	n.mustOpen()
	if s := n.State(); s.Wrapper != "tpm" || s.Fallback != nil {
		t.Errorf("opened by %s, fallback because of %v", s.Wrapper, s.Fallback)
	}
	if text := log.String(); !strings.Contains(text, "the suspension overrules it") || !strings.Contains(text, "another kernel") {
		t.Errorf("the log is %s", text)
	}
	n.wrapper.set(seal.Errorf(seal.CauseBootState, "x", "the suspension is over"))
	n.restart()
	n.mustOpen()
	s := n.State()
	if s.Wrapper != second.name {
		t.Errorf("opened by %s", s.Wrapper)
	}
	wantRefusal(t, s.Fallback, seal.CauseBootPolicy, "another kernel", "the suspension is over")
}

// TestFirstMissingSlotIsNamed: of several wrappers without a slot, the first one in
// the order is named as the reason for the fallback.
func TestFirstMissingSlotIsNamed(t *testing.T) {
	n := newNode(t)
	second, third := n.fallback(), &openWrapper{name: "pkcs11", steps: &n.steps}
	n.cfg.Wrappers = append(n.cfg.Wrappers, third)
	n.restart()
	n.makeWith(third)
	n.mustOpen()
	wantRefusal(t, n.State().Fallback, seal.CauseNoSlot, "no tpm slot")
	n.cfg.Wrappers = []seal.Wrapper{second, n.wrapper, third}
	n.restart()
	n.mustOpen()
	wantRefusal(t, n.State().Fallback, seal.CauseNoSlot, "no vault slot")
}

// TestHintForSlotsOfOtherWrappers: if the keyring has a slot of a type that unlock.order
// does not name, the hint doubts the keyring. It never says to name the type, because the
// writer of the keyring chooses it.
func TestHintForSlotsOfOtherWrappers(t *testing.T) {
	for kind, hint := range map[string]string{
		seal.TypeVault: "nothing authenticates this list", seal.TypeRecovery: "if this machine was renamed",
	} {
		n := newNode(t)
		n.makeWith(&openWrapper{name: kind, steps: &n.steps})
		err := n.Unlock(ctx)
		wantRefusal(t, err, seal.CauseNoSlot, hint)
		if _, remedy := seal.SplitHint(err); strings.Contains(remedy, seal.TypeVault) {
			t.Errorf("it advises what the slot says: %s", remedy)
		}
	}
}

// TestWithoutTPM: a machine without a TPM has neither a gate nor epochs to end.
func TestWithoutTPM(t *testing.T) {
	n := newNode(t)
	n.make()
	n.cfg.Gate, n.cfg.Settle = nil, nil
	n.wrapper.set(seal.Errorf(seal.CauseUnavailable, "x", "no token"))
	n.restart()
	wantRefusal(t, n.Unlock(ctx), seal.CauseUnavailable, "no token")
	n.wrapper.set(nil)
	n.mustOpen()
	if err := n.rotate(); err != nil {
		t.Error(err)
	}
}

// TestReadOnlyDisk: a keyring opens from a read-only disk if its anchor is stored
// already. A new anchor could not be stored, so the keyring does not open.
func TestReadOnlyDisk(t *testing.T) {
	n := newNode(t)
	k := n.make()
	n.anchor.saves.set(syscall.EROFS)
	if err := n.Unlock(ctx); err != nil {
		t.Errorf("the anchor is stored already: %v", err)
	}
	next := n.ok(k.AtLeast(7))
	n.put(next.Marshal())
	n.restart()
	if err := n.Unlock(ctx); !errors.Is(err, syscall.EROFS) {
		t.Errorf("the anchor can't be stored: %v", err)
	}
	if n.State().Open {
		t.Error("a keyring is open that is not anchored")
	}
}

// TestStateAfterAChange: a change keeps the wrapper and the time of the opening, and
// the opening sets that time.
func TestStateAfterAChange(t *testing.T) {
	n := newNode(t)
	n.make()
	started := n.State().Since
	n.mustOpen()
	opened := n.State()
	if !opened.Since.After(started) {
		t.Errorf("open since %s, started at %s", opened.Since, started)
	}
	if err := n.rotate(); err != nil {
		t.Fatal(err)
	}
	if s := n.State(); s.Since != opened.Since || s.Wrapper != "tpm" || s.Timing != opened.Timing {
		t.Errorf("after the opening: %+v, after a rotation: %+v", opened, s)
	}
}

// TestSaveOverAnUnreadableFile: Save does not replace a file that it can't read.
func TestSaveOverAnUnreadableFile(t *testing.T) {
	n := opened(t)
	n.store.loads.set(errors.New("is a symbolic link"))
	wantRefusal(t, n.Save(ctx), seal.CauseStore, "is a symbolic link", "move that file away")
}

// TestSaveIsNotInterrupted: once Save has begun, a caller that goes away does not stop
// it between the keyring and the anchor.
func TestSaveIsNotInterrupted(t *testing.T) {
	n := opened(t)
	n.move("anchor.json", "away")
	cancelled, cancel := context.WithCancel(ctx)
	n.store.saved = cancel
	if err := n.Save(cancelled); err != nil {
		t.Fatal(err)
	}
	n.restart()
	n.mustOpen()
}

// TestNoKEKIsLeft: a change that succeeds closes the KEKs of the keyring that it
// replaces, and a change that fails those of the new one.
func TestNoKEKIsLeft(t *testing.T) {
	for name, fault := range map[string]error{"a rotation": nil, "a failed rotation": errors.New("no space left on device")} {
		n := opened(t)
		if err := n.rotate(); err != nil {
			t.Fatal(err)
		}
		sealtest.NoSecretLeft(t, func() {
			n.store.saves.set(fault)
			for range 3 {
				if err := n.rotate(); (err == nil) != (fault == nil) {
					t.Error(err)
				}
			}
			n.store.saves.set(nil)
		})
		sealtest.NoSecretLeft(t, n.mustOpen) // a reload
		if t.Failed() {
			t.Fatal(name)
		}
	}
}
