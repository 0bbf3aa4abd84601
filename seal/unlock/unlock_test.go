package unlock_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

func TestLockedUntilUnlocked(t *testing.T) {
	n := newNode(t)
	k := n.make()
	_, _, err := n.Encrypt([]byte("x"))
	wantRefusal(t, err, seal.CauseStarting)
	_, err = n.Decrypt(k.CurrentID(), []byte("x"))
	wantRefusal(t, err, seal.CauseStarting)
	select {
	case <-n.Tried():
		t.Error("tried before the first attempt")
	default:
	}
	if err := n.Unlock(ctx); err != nil {
		t.Fatal(err)
	}
	<-n.Tried()
	wantSteps(t, n.steps.take(), "gate", "slot tpm", "anchor 1", "settle while nothing is announced")
	s := n.State()
	if !s.Open || s.Wrapper != "tpm" || s.Problem != nil || s.Attempts != 0 || s.Timing.Total <= 0 {
		t.Errorf("state %+v", s)
	}
	n.decrypts(n.encrypt())
	n.Close()
	_, err = n.CurrentID()
	wantRefusal(t, err, seal.CauseStarting)
}

// TestRefusals: each reason to stay locked has its own cause. The keyring opens, with
// nothing lost, once the reason is gone.
func TestRefusals(t *testing.T) {
	for _, test := range []struct {
		name   string
		damage func(n *node)
		mend   func(n *node)
		cause  seal.Cause
		says   string
	}{
		{"no keyring", func(n *node) { n.move("keyring.json", "away") }, func(n *node) { n.move("away", "keyring.json") }, seal.CauseKeyringMissing, "kleidi init"},
		{"no anchor", func(n *node) { n.move("anchor.json", "away") }, func(n *node) { n.move("away", "anchor.json") }, seal.CauseAnchor, "no anchor"},
		{"damaged anchor", func(n *node) { n.damage("anchor.json") }, func(n *node) { n.move("away", "anchor.json") }, seal.CauseAnchor, "parse anchor"},
		{"damaged keyring", func(n *node) { n.damage("keyring.json") }, func(n *node) { n.move("away", "keyring.json") }, seal.CauseKeyringCorrupt, "parse keyring"},
		{"unreadable keyring", func(n *node) { n.store.loads.set(errors.New("input/output error")) }, func(n *node) { n.store.loads.set(nil) }, seal.CauseStore, "keyring: input/output error"},
		{"gate", func(n *node) { n.gate.set(seal.Errorf(seal.CauseAttestation, "look", "PCR 7 differs")) }, func(n *node) { n.gate.set(nil) }, seal.CauseAttestation, "PCR 7"},
		{"slot", func(n *node) { n.wrapper.set(seal.Errorf(seal.CauseBootState, "recover", "refused")) }, func(n *node) { n.wrapper.set(nil) }, seal.CauseBootState, "explained: refused"},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := newNode(t)
			n.make()
			test.damage(n)
			err := n.Unlock(ctx)
			wantRefusal(t, err, test.cause, test.says)
			_, _, encryptErr := n.Encrypt([]byte("x"))
			if encryptErr != err || n.State().Problem != err || n.State().Attempts != 1 || n.State().Open {
				t.Errorf("Encrypt ends in %v, the state is %+v", encryptErr, n.State())
			}
			test.mend(n)
			n.mustOpen()
			n.decrypts(n.encrypt())
		})
	}
}

// TestEpochThatCannotBeEnded: an epoch that can't be ended, so that revoked slots still
// open, is shown and tried again. The keyring opens, because the cluster must go on.
func TestEpochThatCannotBeEnded(t *testing.T) {
	n := newNode(t)
	n.make()
	n.settle.set(seal.Errorf(seal.CauseUnavailable, "wait", "no TPM"))
	err := n.Unlock(ctx)
	wantRefusal(t, err, seal.CauseUnavailable, "slots of the earlier epoch still open")
	if s := n.State(); !s.Open || s.Problem != err || s.Attempts != 1 {
		t.Errorf("state %+v", s)
	}
	e := n.encrypt()
	wantRefusal(t, n.rotate(), seal.CauseUnavailable, "saved and in use", "still open")
	if id, _ := n.CurrentID(); id == e.id {
		t.Error("the new KEK is not in use")
	}
	n.settle.set(nil)
	n.mustOpen()
	if s := n.State(); s.Problem != nil || s.Attempts != 0 {
		t.Errorf("state %+v", s)
	}
	n.decrypts(e)
}

func (n *node) move(from, to string) {
	n.t.Helper()
	if err := os.Rename(filepath.Join(n.dir, from), filepath.Join(n.dir, to)); err != nil {
		n.t.Fatal(err)
	}
}

// damage truncates the file, and keeps it whole as "away".
func (n *node) damage(name string) {
	n.t.Helper()
	b := n.read(name)
	n.move(name, "away")
	if err := os.WriteFile(filepath.Join(n.dir, name), b[:len(b)-2], 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// TestReloadKeepsTheOpenKeyring: whatever happens to the stored keyring, the open one
// serves, and the problem is shown.
func TestReloadKeepsTheOpenKeyring(t *testing.T) {
	n := opened(t)
	e := n.encrypt()
	since := n.State().Since
	good := n.read("keyring.json")
	for name, bad := range map[string][]byte{
		"truncated": good[:len(good)/2], "empty": {}, "other": n.newKeyring(n.wrapper).Marshal(),
	} {
		n.put(bad)
		if !n.Changed(ctx) {
			t.Errorf("%s: no change is noticed", name)
		}
		if err := n.Unlock(ctx); err == nil {
			t.Errorf("%s: the reload succeeded", name)
		}
		s := n.State()
		if !s.Open || s.Problem == nil || s.Since != since {
			t.Errorf("%s: state %+v", name, s)
		}
		n.decrypts(e)
		n.decrypts(n.encrypt())
		if err := n.rotate(); err == nil {
			t.Errorf("%s: a rotation replaced what it had not read", name)
		}
		if string(n.read("keyring.json")) != string(bad) {
			t.Errorf("%s: the stored keyring was overwritten", name)
		}
	}
	n.put(good)
	if !n.Changed(ctx) {
		t.Error("the repair is not noticed")
	}
	n.mustOpen()
	if s := n.State(); s.Problem != nil || s.Since != since || n.Changed(ctx) {
		t.Errorf("after the repair: %+v", s)
	}
}

func TestChanged(t *testing.T) {
	n := opened(t)
	if n.Changed(ctx) {
		t.Error("changed right after it was read")
	}
	if err := n.rotate(); err != nil {
		t.Fatal(err)
	}
	if n.Changed(ctx) {
		t.Error("changed by its own rotation")
	}
	n.store.loads.set(errors.New("input/output error"))
	if !n.Changed(ctx) {
		t.Error("an unreadable keyring is not noticed")
	}
	n.store.loads.set(nil)
	n.move("keyring.json", "away")
	if !n.Changed(ctx) {
		t.Error("a missing keyring is not noticed")
	}
}

// TestWhatIsOpenIsStoredAgain: whatever happens to the stored keyring, the open one
// serves, the problem is shown, and Save stores the open keyring again.
func TestWhatIsOpenIsStoredAgain(t *testing.T) {
	for name, damage := range map[string]func(*node){
		"gone":      func(n *node) { n.move("keyring.json", "away") },
		"damaged":   func(n *node) { n.damage("keyring.json") },
		"no anchor": func(n *node) { n.move("anchor.json", "away") },
	} {
		t.Run(name, func(t *testing.T) {
			n := opened(t)
			first := n.encrypt()
			if err := n.rotate(); err != nil {
				t.Fatal(err)
			}
			second := n.encrypt()
			damage(n)
			err := n.Unlock(ctx)
			if err == nil || !strings.Contains(err.Error(), "kleidi keyring save") {
				t.Fatalf("the reload ends in %v", err)
			}
			n.decrypts(second)
			if err := n.Save(ctx); err != nil {
				t.Fatal(err)
			}
			if p := n.State().Problem; p != nil {
				t.Errorf("still a problem: %v", p)
			}
			n.restart()
			n.mustOpen()
			n.decrypts(first)
			n.decrypts(second)
		})
	}
}

// TestOpenNeverGoesBack: serve keeps its open keyring, with every announced KEK, if an
// older keyring and the older anchor are put back.
func TestOpenNeverGoesBack(t *testing.T) {
	n := opened(t)
	keyring, anchor := n.read("keyring.json"), n.read("anchor.json")
	if err := n.rotate(); err != nil {
		t.Fatal(err)
	}
	e := n.encrypt()
	for name, b := range map[string][]byte{"keyring.json": keyring, "anchor.json": anchor} {
		if err := os.WriteFile(filepath.Join(n.dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	wantRefusal(t, n.Unlock(ctx), seal.CauseAnchor, "does not follow the open one", "kleidi keyring save")
	if id, err := n.CurrentID(); err != nil || id != e.id {
		t.Errorf("announced is %s, %v", id, err)
	}
	n.decrypts(e)
	if err := n.Save(ctx); err != nil {
		t.Fatal(err)
	}
	n.restart()
	n.mustOpen()
	n.decrypts(e)
}

// TestOpenNeverGoesBackARevision: the same holds for an older revision with the same KEK,
// because that revision still holds a removed slot.
func TestOpenNeverGoesBackARevision(t *testing.T) {
	n := opened(t)
	older, olderAnchor := n.read("keyring.json"), n.read("anchor.json")
	err := n.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := k.WithSlots(k.Slots())
		return []*keyring.Keyring{next}, err
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"keyring.json": older, "anchor.json": olderAnchor} {
		if err := os.WriteFile(filepath.Join(n.dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	wantRefusal(t, n.Unlock(ctx), seal.CauseAnchor, "has revision 1 and does not follow the open one, which has revision 2")
	if k, err := n.Keyring(); err != nil || k.Revision() != 2 {
		t.Errorf("the open keyring is of revision %d, %v", k.Revision(), err)
	}
}

// TestAnchor: the anchor refuses an older keyring, and follows a newer one.
func TestAnchor(t *testing.T) {
	n := opened(t)
	first := n.read("keyring.json")
	firstAnchor := n.read("anchor.json")
	e := n.encrypt()
	if err := n.rotate(); err != nil {
		t.Fatal(err)
	}
	second := n.read("keyring.json")
	n.steps.take()

	n.restart()
	n.put(first)
	wantRefusal(t, n.Unlock(ctx), seal.CauseAnchor, "does not hold the anchored key ID")
	n.put(second)

	// A crash between saving and anchoring leaves an older anchor, which is then replaced.
	if err := os.WriteFile(filepath.Join(n.dir, "anchor.json"), firstAnchor, 0o600); err != nil {
		t.Fatal(err)
	}
	n.steps.take()
	if err := n.Unlock(ctx); err != nil {
		t.Fatal(err)
	}
	wantSteps(t, n.steps.take(), "gate", "slot tpm", "anchor 3", "settle while nothing is announced")
	n.decrypts(e)

	// The older keyring is also refused while a newer one is open.
	n.put(first)
	wantRefusal(t, n.Unlock(ctx), seal.CauseAnchor)
	n.decrypts(e)
	n.decrypts(n.encrypt())
}

// TestOlderRevisionOfTheSameKEK: an older revision is refused although its KEK is the
// anchored one.
func TestOlderRevisionOfTheSameKEK(t *testing.T) {
	n := opened(t)
	first := n.read("keyring.json")
	err := n.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := k.WithSlots(k.Slots())
		return []*keyring.Keyring{next}, err
	})
	if err != nil {
		t.Fatal(err)
	}
	n.restart()
	n.put(first)
	wantRefusal(t, n.Unlock(ctx), seal.CauseAnchor, "revision 1", "revision 2 or later")
}

// TestAttackersKEK: a keyring with an attacker's KEK is refused, although it is
// consistent, of the same cluster and of a later revision, and its slot opens.
func TestAttackersKEK(t *testing.T) {
	n := opened(t)
	k := n.newKeyring(n.wrapper)
	for range 5 {
		next, err := k.AtLeast(0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(next.Close)
		k = next
	}
	n.restart()
	n.put(k.Marshal())
	wantRefusal(t, n.Unlock(ctx), seal.CauseAnchor, "does not hold the anchored key ID")
	if string(n.read("keyring.json")) != string(k.Marshal()) {
		t.Error("the evidence was overwritten")
	}
}

func TestSwappedSlot(t *testing.T) {
	n := newNode(t)
	k, other := n.make(), n.newKeyring(n.wrapper)
	n.put(edited(t, k.Marshal(), string(k.Slots()[0].Data), string(other.Slots()[0].Data)))
	wantRefusal(t, n.Unlock(ctx), seal.CauseSlotCorrupt, string(other.CurrentID()))
}

func TestEditedBody(t *testing.T) {
	n := newNode(t)
	k := n.make()
	n.put(edited(t, k.Marshal(), `"revision":1`, `"revision":9`))
	wantRefusal(t, n.Unlock(ctx), seal.CauseKeyringCorrupt, "MAC")
}

// TestSlotsInOrder: wrappers are tried in the configured order, and the slots of each in
// the order of the keyring. A wrapper that is not configured is never tried.
func TestSlotsInOrder(t *testing.T) {
	n := newNode(t)
	vault := &openWrapper{name: "vault", steps: &n.steps}
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	slots := []seal.Slot{vault.slot(kek, ""), n.wrapper.slot(kek, " revoked"), n.wrapper.slot(kek, " earlier"), n.wrapper.slot(kek, " broken")}
	k, err := keyring.New(seal.ClusterID{1}, kek, slots, nil, now)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	n.put(k.Marshal())
	if err := n.anchor.Save(ctx, k.Anchor()); err != nil {
		t.Fatal(err)
	}
	n.steps.take()
	n.wrapper.verdicts = map[string]error{
		" revoked": seal.Errorf(seal.CauseEpoch, "x", "epoch"),
		" earlier": seal.Errorf(seal.CauseBootState, "x", "boot state"),
		" broken":  seal.Errorf(seal.CauseSlotCorrupt, "x", "corrupt"),
	}
	wantRefusal(t, n.Unlock(ctx), seal.CauseEpoch, "explained: epoch")
	wantSteps(t, n.steps.take(), "gate", "slot tpm revoked", "slot tpm earlier", "slot tpm broken")

	n.cfg.Wrappers = []seal.Wrapper{n.wrapper, vault}
	n.restart()
	if err := n.Unlock(ctx); err != nil || n.State().Wrapper != "vault" {
		t.Errorf("%v, opened by %q", err, n.State().Wrapper)
	}
	wantSteps(t, n.steps.take(), "gate", "slot tpm revoked", "slot tpm earlier", "slot tpm broken", "slot vault", "anchor 1", "settle while nothing is announced")

	// If the fallback fails as well, the error names both failures, and the remedy of the
	// first.
	vault.set(seal.Errorf(seal.CauseUnavailable, "start the server", "connection refused"))
	n.restart()
	err = n.Unlock(ctx)
	wantRefusal(t, err, seal.CauseEpoch, "explained: epoch", "vault does not open either: explained: connection refused; start the server")
	if e, ok := errors.AsType[*seal.Error](err); !ok || e.Hint != "x" {
		t.Errorf("the remedy is not that of the first: %v", err)
	}

	n.cfg.Wrappers = nil
	n.restart()
	wantRefusal(t, n.Unlock(ctx), seal.CauseNoSlot, "compare unlock.order with what you set up", "run kleidi keyring restore FILE with a backup")
}

// TestOpenChangesNothing: Open and OpenUnanchored change neither disk nor state.
func TestOpenChangesNothing(t *testing.T) {
	n := newNode(t)
	own := n.make()
	k, err := n.Open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	k.Close()
	foreign := n.newKeyring(n.wrapper)
	untrusted, err := keyring.Parse(foreign.Marshal())
	if err != nil {
		t.Fatal(err)
	}
	if k, _, err = n.OpenUnanchored(ctx, untrusted); err != nil || k.CurrentID() != foreign.CurrentID() {
		t.Fatalf("%v", err)
	}
	k.Close()
	wantSteps(t, n.steps.take(), "gate", "slot tpm", "gate", "slot tpm")
	if n.State().Open || string(n.read("keyring.json")) != string(own.Marshal()) {
		t.Error("looking at a keyring changed something")
	}
	n.gate.set(seal.Errorf(seal.CauseAttestation, "x", "shut"))
	if _, err = n.Open(ctx); seal.CauseOf(err) != seal.CauseAttestation {
		t.Errorf("Open passes a shut gate: %v", err)
	}
	if _, _, err = n.OpenUnanchored(ctx, untrusted); seal.CauseOf(err) != seal.CauseAttestation {
		t.Errorf("OpenUnanchored passes a shut gate: %v", err)
	}
}

func TestAttemptedHearsOfEachAttempt(t *testing.T) {
	n := newNode(t)
	var causes []seal.Cause
	n.cfg.Attempted = func(c seal.Cause, timing unlock.Timing) { causes = append(causes, c) }
	n.restart()
	_ = n.Unlock(ctx)
	n.make()
	n.mustOpen()
	if len(causes) != 2 || causes[0] != seal.CauseKeyringMissing || causes[1] != "" {
		t.Errorf("causes %q", causes)
	}
}

// TestStoppedAttempt: an attempt that is cancelled is not a failure.
func TestStoppedAttempt(t *testing.T) {
	n := newNode(t)
	n.make()
	n.gate.set(context.Canceled)
	before := n.State()
	stopped, stop := context.WithCancel(ctx)
	stop()
	if err := n.Unlock(stopped); err == nil {
		t.Fatal("it unlocked")
	}
	if after := n.State(); after.Attempts != before.Attempts || seal.CauseOf(after.Problem) != seal.CauseOf(before.Problem) {
		t.Errorf("after an attempt that was stopped: %+v, before %+v", after, before)
	}
}

// TestFileAnchor: an unreadable anchor is not taken for a missing one.
func TestFileAnchor(t *testing.T) {
	n := newNode(t)
	if anchor, err := n.anchor.Load(ctx); anchor != nil || err != nil {
		t.Errorf("no file: %v, %v", anchor, err)
	}
	broken := &faultyStore{File: n.store.File, steps: &n.steps}
	p := unlock.FileAnchor{Store: broken}
	broken.loads.set(errors.New("input/output error"))
	_, err := p.Load(ctx)
	wantRefusal(t, err, seal.CauseStore, "anchor: input/output error")
	wantRefusal(t, p.Save(ctx, keyring.Anchor{}), seal.CauseStore)
	broken.loads.set(nil)
	broken.saves.set(errors.New("no space left on device"))
	wantRefusal(t, p.Save(ctx, keyring.Anchor{}), seal.CauseStore, "anchor: no space")
}
