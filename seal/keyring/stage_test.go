package keyring

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// TestOneKEKIsStagedAtATime: other nodes may have acknowledged the staged KEK, so a
// second Stage is refused.
func TestOneKEKIsStagedAtATime(t *testing.T) {
	staged := must[*Keyring](t)(newKeyring(t, 1).Stage(newKEK(t, 60), slots("next"), now))
	before := staged.Marshal()
	_, err := staged.Stage(newKEK(t, 100), slots("again"), now.Add(time.Hour))
	e, ok := errors.AsType[*AlreadyStaged](err)
	if !ok || e.KeyID != staged.StagedID() || !e.Since.Equal(now) {
		t.Fatalf("%v", err)
	}
	for _, s := range []string{string(e.KeyID), "since 2026-11-01T12:00:00Z", "activate or abort"} {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q does not say %q", err, s)
		}
	}
	// The same holds while the staged KEK is not open.
	if _, err := reopen(t, staged, newKEK(t, 1), nil).Stage(newKEK(t, 100), slots("again"), now); !errors.As(err, &e) {
		t.Error(err)
	}
	if !bytes.Equal(staged.Marshal(), before) {
		t.Error("the keyring has changed")
	}
}

// TestAbortRetires: the aborted KEK stays readable, now and after a restart.
func TestAbortRetires(t *testing.T) {
	ok := must[*Keyring](t)
	k := rotate(t, newKeyring(t, 1), 40)
	staged := ok(k.Stage(newKEK(t, 60), slots("next"), now.Add(time.Hour)))
	id := staged.StagedID()
	activated := ok(staged.Activate(now)) // by a node that is ahead
	c, _, err := activated.Encrypt([]byte("seed"))
	if err != nil {
		t.Fatal(err)
	}
	aborted := ok(staged.Abort(now.Add(2 * time.Hour)))
	anchor := k.Anchor()
	for what, k := range map[string]*Keyring{"now": aborted, "after a restart": reopen(t, aborted, newKEK(t, 40), &anchor)} {
		if p, err := k.Decrypt(id, c); err != nil || string(p) != "seed" {
			t.Errorf("%s: %q, %v", what, p, err)
		}
		i := k.Info()
		last := i.Retired[len(i.Retired)-1]
		if k.StagedID() != "" || len(i.Retired) != 2 || last.KeyID != id || !last.Created.Equal(now.Add(time.Hour)) || !last.Retired.Equal(now.Add(2*time.Hour)) {
			t.Errorf("%s: %+v", what, i)
		}
		if k.CurrentID() != staged.CurrentID() || k.Revision() != staged.Revision()+1 {
			t.Errorf("%s: current %s, revision %d", what, k.CurrentID(), k.Revision())
		}
	}
	if staged.StagedID() != id || len(staged.Info().Retired) != 1 {
		t.Error("the keyring that was aborted has changed")
	}
	again := ok(aborted.Stage(newKEK(t, 100), slots("again"), now))
	if got := ok(again.Activate(now)); !got.Holds(id) || len(got.Info().Retired) != 3 {
		t.Error("the next rotation forgets the KEK")
	}
	if _, err := aborted.Stage(newKEK(t, 60), slots("again"), now); err == nil {
		t.Error("an aborted KEK is staged again")
	}
}

// TestAbortNeedsTheKEK: a staged KEK that is not open can't be retired. It is dropped
// only if no other node may use it.
func TestAbortNeedsTheKEK(t *testing.T) {
	ok := must[*Keyring](t)
	k := newKeyring(t, 1)
	staged := ok(k.Stage(newKEK(t, 60), slots("next"), now))
	closed := reopen(t, staged, newKEK(t, 1), nil)
	_, err := closed.Abort(now)
	if err == nil || !strings.Contains(err.Error(), "not open here") || !strings.Contains(err.Error(), string(staged.StagedID())) {
		t.Error(err)
	}
	if err := errors.Join(errOf(k.Abort(now)), errOf(k.GiveUpStaged())); !errors.Is(err, errNothingStaged) || strings.Count(err.Error(), "no KEK is staged") != 2 {
		t.Errorf("nothing is staged: %v", err)
	}
	if _, err := staged.GiveUpStaged(); err == nil {
		t.Error("an open KEK is dropped")
	}
	two := ok(closed.WithNodes([]Node{{Name: "cp-1"}, {Name: "cp-2"}}, closed.Slots()))
	if _, err := two.GiveUpStaged(); err == nil || !strings.Contains(err.Error(), "another node") {
		t.Errorf("beside another node: %v", err)
	}
	dropped := ok(closed.GiveUpStaged())
	if dropped.StagedID() != "" || dropped.Revision() != closed.Revision()+1 || len(dropped.Info().Retired) != 0 {
		t.Errorf("%+v", dropped.Info())
	}
}

// TestRoom: a rotation retires the current KEK and the KEK that an interrupted rotation
// left staged.
func TestRoom(t *testing.T) {
	k := newKeyring(t, 1)
	fill := func(retired int) *Keyring {
		doc := *k.doc
		doc.Retired = manyRetired(retired)
		return &Keyring{doc: &doc, staged: k.staged}
	}
	for retired, want := range map[int]bool{0: true, MaxRetired - 1: true, MaxRetired: false} {
		if got := fill(retired).HasRoom(); got != want {
			t.Errorf("%d retired: %v", retired, got)
		}
	}
	k = must[*Keyring](t)(k.Stage(newKEK(t, 60), slots("next"), now))
	for retired, want := range map[int]bool{MaxRetired - 2: true, MaxRetired - 1: false} {
		if got := fill(retired).HasRoom(); got != want {
			t.Errorf("one staged and %d retired: %v", retired, got)
		}
	}
}

// TestStagedID tells a staged KEK that is open from one that is not.
func TestStagedID(t *testing.T) {
	k := newKeyring(t, 1)
	if k.StagedID() != "" {
		t.Error("a KEK is staged")
	}
	staged := must[*Keyring](t)(k.Stage(newKEK(t, 60), slots("next"), now))
	id := NewKeyID(cluster, newKEK(t, 60))
	if staged.StagedID() != id || !staged.Holds(id) {
		t.Error("the staged KEK is not open")
	}
	closed := reopen(t, staged, newKEK(t, 1), nil)
	if closed.StagedID() != id || closed.Holds(id) || closed.Holds(seal.KeyID("")) {
		t.Error("a KEK is open that came out of no slot")
	}
}
