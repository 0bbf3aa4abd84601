package unlock_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

// TestOrderOfAChange: a new keyring is saved and anchored, then the earlier epoch ends,
// and only then is the new key ID announced.
func TestOrderOfAChange(t *testing.T) {
	n := opened(t)
	former := n.encrypt()
	if err := n.rotate(); err != nil {
		t.Fatal(err)
	}
	id, _ := n.CurrentID()
	if id == former.id {
		t.Fatal("the key ID is the same")
	}
	wantSteps(t, n.steps.take(), "slot tpm", "save", "save", "anchor 3", fmt.Sprintf("settle while %.8s is announced", former.id))
	n.decrypts(former)
	n.decrypts(n.encrypt())
	n.restart()
	n.mustOpen()
	n.decrypts(former)
}

// TestRotationThatFailsEarly: a rotation that fails before its first save changes
// nothing.
func TestRotationThatFailsEarly(t *testing.T) {
	for name, damage := range map[string]func(*node){
		"wrap":       func(n *node) { n.wrapper.set(seal.Errorf(seal.CauseUnavailable, "x", "no TPM")) },
		"first save": func(n *node) { n.store.saves.set(errors.New("no space left on device")) },
		"conflict":   func(n *node) { n.store.saves.set(store.ErrConflict) },
	} {
		t.Run(name, func(t *testing.T) {
			n := opened(t)
			e, before, anchor := n.encrypt(), n.read("keyring.json"), n.read("anchor.json")
			damage(n)
			if err := n.rotate(); err == nil {
				t.Fatal("it succeeded")
			}
			if string(n.read("keyring.json")) != string(before) || string(n.read("anchor.json")) != string(anchor) {
				t.Error("the keyring or the anchor has changed")
			}
			if id, err := n.CurrentID(); id != e.id || err != nil {
				t.Errorf("current %s, %v", id, err)
			}
			n.decrypts(e)
			n.wrapper.set(nil)
			n.store.saves.set(nil)
			if err := n.rotate(); err != nil {
				t.Errorf("the next rotation: %v", err)
			}
		})
	}
}

// TestCrashes: the process ends after each step of a rotation. The keyring opens, and
// every announced KEK still decrypts.
func TestCrashes(t *testing.T) {
	for _, test := range []struct {
		name     string
		damage   func(*node)
		revision uint64
	}{
		{"after the first revision", func(n *node) { n.store.after = 1; n.store.saves.set(errors.New("killed")) }, 2},
		{"before the anchor", func(n *node) { n.anchor.saves.set(seal.Errorf(seal.CauseStore, "x", "killed")) }, 3},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := opened(t)
			e := n.encrypt()
			test.damage(n)
			if err := n.rotate(); err == nil {
				t.Fatal("it succeeded")
			}
			if id, _ := n.CurrentID(); id != e.id {
				t.Error("the new key ID is announced")
			}
			n.decrypts(n.encrypt())
			n.store.saves.set(nil)
			n.anchor.saves.set(nil)
			n.settle.set(nil)
			n.restart()
			n.mustOpen()
			k, _ := n.Keyring()
			if k.Revision() != test.revision {
				t.Errorf("revision %d, want %d", k.Revision(), test.revision)
			}
			n.decrypts(e)
			if err := n.rotate(); err != nil {
				t.Fatalf("the next rotation: %v", err)
			}
			if k, _ := n.Keyring(); k.Info().Staged != nil {
				t.Error("a KEK is still staged")
			}
			n.decrypts(e)
			n.restart()
			n.mustOpen()
			n.decrypts(e)
		})
	}
}

// TestPreviousOfARotation: each of the two files of a rotation opens alone and leads to
// the fresh KEK.
func TestPreviousOfARotation(t *testing.T) {
	n := opened(t)
	old := n.encrypt()
	if err := n.rotate(); err != nil {
		t.Fatal(err)
	}
	fresh := n.encrypt()
	for _, name := range []string{"keyring.json", "keyring.json.previous"} {
		untrusted, err := keyring.Parse(n.read(name))
		if err != nil {
			t.Fatal(err)
		}
		opened, _, err := n.OpenUnanchored(ctx, untrusted)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		defer opened.Close()
		k, err := rotation.Complete(ctx, opened, []seal.Wrapper{n.wrapper}, now)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		defer k.Close()
		for _, e := range []encrypted{old, fresh} {
			if _, err := k.Decrypt(e.id, e.ciphertext); err != nil {
				t.Errorf("%s does not decrypt under %s: %v", name, e.id, err)
			}
		}
		if k.CurrentID() != fresh.id {
			t.Errorf("%s: current is %s, want the fresh KEK", name, k.CurrentID())
		}
	}
}

// TestConflict: a change does not overwrite a keyring that somebody else has saved since.
// The next reload opens that keyring.
func TestConflict(t *testing.T) {
	n := opened(t)
	k, _ := n.Keyring()
	other, err := k.AtLeast(7)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	n.put(other.Marshal())
	wantRefusal(t, n.rotate(), seal.CauseStore, "changed by someone else")
	if string(n.read("keyring.json")) != string(other.Marshal()) {
		t.Error("it was overwritten")
	}
	n.mustOpen()
	if k, _ := n.Keyring(); k.Revision() != 7 {
		t.Errorf("revision %d", k.Revision())
	}
	if err := n.rotate(); err != nil {
		t.Error(err)
	}
}

func TestChangeNeedsAnOpenKeyring(t *testing.T) {
	n := newNode(t)
	n.make()
	wantRefusal(t, n.rotate(), seal.CauseStarting)
	called := false
	n.gate.set(seal.Errorf(seal.CauseAttestation, "x", "shut"))
	_ = n.Unlock(ctx)
	err := n.Change(ctx, func(*keyring.Keyring) ([]*keyring.Keyring, error) { called = true; return nil, nil })
	wantRefusal(t, err, seal.CauseAttestation)
	if called {
		t.Error("a locked keyring was changed")
	}
}

// TestAdopt: a keyring that was opened in another way replaces the stored one, if that
// still has the version that the caller loaded.
func TestAdopt(t *testing.T) {
	n := newNode(t)
	n.make()
	n.gate.set(seal.Errorf(seal.CauseAttestation, "x", "shut"))
	_ = n.Unlock(ctx)
	n.steps.take()
	_, version, err := n.store.Load(ctx)
	if err != nil {
		t.Fatal(err)
	}
	foreign := n.newKeyring(n.wrapper)
	raised, err := foreign.AtLeast(4)
	if err != nil {
		t.Fatal(err)
	}
	wantRefusal(t, n.Adopt(ctx, "another version", unlock.Opener{Wrapper: "recovery"}, raised, []*keyring.Keyring{raised}), seal.CauseStore)
	if n.State().Open {
		t.Fatal("it is open although nothing was saved")
	}
	if raised, err = foreign.AtLeast(4); err != nil {
		t.Fatal(err)
	}
	refused := errors.New("refused")
	if err := n.Adopt(ctx, version, unlock.Opener{Wrapper: "recovery", Fallback: refused}, raised, []*keyring.Keyring{raised}); err != nil {
		t.Fatal(err)
	}
	wantSteps(t, n.steps.take(), "save", "save", "anchor 4", "settle while nothing is announced")
	if s := n.State(); !s.Open || s.Wrapper != "recovery" || s.Fallback != refused || s.Problem != nil {
		t.Errorf("state %+v", s)
	}
}

// records is a log handler that sends to told for each record.
type records struct {
	slog.Handler
	told chan struct{}
}

func (r records) Enabled(context.Context, slog.Level) bool { return true }

func (r records) Handle(context.Context, slog.Record) error {
	r.told <- struct{}{}
	return nil
}

// until waits until reached returns true. It calls reached after each log record.
func (n *node) until(what string, log records, reached func() bool) {
	n.t.Helper()
	timeout := time.After(2 * time.Minute)
	for !reached() {
		select {
		case <-log.told:
		case <-timeout:
			n.t.Fatalf("%s: not reached; state %+v", what, n.State())
		}
	}
}

// TestRun: Run tries again by itself, and at once when nudged. While the keyring is
// open, a nudge reloads it.
func TestRun(t *testing.T) {
	n := newNode(t)
	k := n.make()
	log := records{slog.DiscardHandler, make(chan struct{}, 100)}
	n.cfg.Log = slog.New(log)
	n.restart()
	n.gate.set(seal.Errorf(seal.CauseAttestation, "x", "shut"))
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { n.Run(ctx) })
	<-n.Tried()
	n.until("two attempts by itself", log, func() bool { return n.State().Attempts >= 2 && !n.State().Next.IsZero() })
	n.gate.set(nil)
	n.Nudge()
	n.Nudge() // a second nudge does not block
	n.until("open", log, func() bool { return n.State().Open })
	next, err := k.AtLeast(9)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	n.put(next.Marshal())
	n.Nudge()
	n.until("the reload", log, func() bool { k, err := n.Keyring(); return err == nil && k.Revision() == 9 })
	cancel()
	running.Wait()
}

// TestConcurrentUse: all calls during rotations and reloads succeed, and each
// ciphertext comes with the ID of the KEK that encrypted it.
func TestConcurrentUse(t *testing.T) {
	n := opened(t)
	stop := make(chan struct{})
	var calls sync.WaitGroup
	for range 4 {
		calls.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				c, id, err := n.Encrypt([]byte("a DEK seed"))
				if err != nil {
					t.Errorf("encrypt: %v", err)
					return
				}
				if _, err := n.Decrypt(id, c); err != nil {
					t.Errorf("decrypt: %v", err)
					return
				}
				if _, err := n.CurrentID(); err != nil || !n.State().Open {
					t.Errorf("locked: %v", err)
				}
			}
		})
	}
	for range 10 {
		if err := n.rotate(); err != nil {
			t.Error(err)
		}
		if err := n.Unlock(ctx); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	calls.Wait()
	if k, _ := n.Keyring(); len(k.Info().Retired) != 10 {
		t.Errorf("%d retired KEKs", len(k.Info().Retired))
	}
}

// TestSavedAndNotAnnounced: if the anchor can't be saved, the error says that the new
// keyring is saved but not announced.
func TestSavedAndNotAnnounced(t *testing.T) {
	n := opened(t)
	n.anchor.saves.set(seal.Errorf(seal.CauseStore, "free some space", "no space left on device"))
	err := n.rotate()
	wantRefusal(t, err, seal.CauseStore, "saved but not yet announced")
	if !strings.Contains(err.Error(), "free some space") {
		t.Errorf("no hint in %v", err)
	}
	n.anchor.saves.set(nil)
	former := n.encrypt()
	n.mustOpen() // as Run does, which was nudged
	if id, _ := n.CurrentID(); id == former.id {
		t.Error("the saved KEK is not announced")
	}
	n.decrypts(former)
}

// TestReloadOvertakesADecrypt: the first call that needs the cipher of a retired KEK
// makes it. A reload may close the keyring before that.
func TestReloadOvertakesADecrypt(t *testing.T) {
	n := opened(t)
	seeds := []encrypted{n.encrypt()}
	for range 25 {
		if err := n.rotate(); err != nil {
			t.Fatal(err)
		}
		seeds = append(seeds, n.encrypt())
	}
	stop := make(chan struct{})
	var calls sync.WaitGroup
	for range 4 {
		calls.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
					n.decrypts(seeds[i%len(seeds)])
				}
			}
		})
	}
	for range 25 {
		if err := n.Unlock(ctx); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	calls.Wait()
}

// witness records which key ID is announced when it is told of a change.
type witness struct{ n *node }

func (w witness) Opened(context.Context, *keyring.Keyring) {}

func (w witness) Changing(context.Context, unlock.SlotChange) error { return w.tell("changing") }

func (w witness) Changed(context.Context) { _ = w.tell("changed") }

func (w witness) tell(what string) error {
	id, err := w.n.CurrentID()
	w.n.steps.add("%s while %.8s is announced", what, id)
	return err
}

// TestWitnessOfAChange: a witness is told of a change before the change is saved, and is
// told that the change is made once the new keyring is the open one. If it were told
// earlier, it would take the former slots, which are still those of the open keyring, for
// somebody else's.
func TestWitnessOfAChange(t *testing.T) {
	n := newNode(t)
	n.cfg.Witness = witness{n}
	n.make()
	n.restart()
	n.mustOpen()
	former, _ := n.CurrentID()
	n.steps.take()
	if err := n.rotate(); err != nil {
		t.Fatal(err)
	}
	id, _ := n.CurrentID()
	wantSteps(t, n.steps.take(), "slot tpm", fmt.Sprintf("changing while %.8s is announced", former), "save", "save", "anchor 3",
		fmt.Sprintf("settle while %.8s is announced", former), fmt.Sprintf("changed while %.8s is announced", id))
}
