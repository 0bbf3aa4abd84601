package unlock_test

import (
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// stagedNode returns a node whose stored keyring has a staged KEK in a slot with the
// text "staged", and a DEK seed that another node encrypted after activating that KEK.
func stagedNode(t *testing.T) (*node, encrypted) {
	t.Helper()
	n := newNode(t)
	k := n.make()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	staged, err := k.Stage(kek, []seal.Slot{n.wrapper.slot(kek, "staged")}, now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(staged.Close)
	active, err := staged.Activate(now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(active.Close)
	c, id, err := active.Encrypt([]byte("a DEK seed"))
	if err != nil {
		t.Fatal(err)
	}
	n.put(staged.Marshal())
	return n, encrypted{id, c}
}

// TestStagedKEKDecryptsAfterARestart: a node was down while another node activated the
// staged KEK. After its restart it decrypts at once what that node encrypted.
func TestStagedKEKDecryptsAfterARestart(t *testing.T) {
	n, e := stagedNode(t)
	n.mustOpen()
	n.decrypts(e)
	if s := n.State(); s.Staged != nil || s.Problem != nil {
		t.Errorf("%+v", s)
	}
	if id, _ := n.CurrentID(); id == e.id {
		t.Error("the staged KEK is current")
	}
	n.restart()
	n.mustOpen()
	n.decrypts(e)
}

// TestOnlyTheStagedKEKFails: a node on which only the staged KEK does not open serves,
// and says why that KEK does not open until it does.
func TestOnlyTheStagedKEKFails(t *testing.T) {
	n, e := stagedNode(t)
	n.wrapper.verdicts["staged"] = seal.Errorf(seal.CauseEpoch, "run kleidi recover", "revoked")
	n.mustOpen()
	s := n.State()
	if !s.Open || s.Problem != nil {
		t.Errorf("it does not serve: %+v", s)
	}
	wantRefusal(t, s.Staged, seal.CauseEpoch, string(e.id), "revoked", "goes on serving")
	n.decrypts(n.encrypt())
	if _, err := n.Decrypt(e.id, e.ciphertext); err != seal.ErrUnknownKey {
		t.Errorf("it decrypts under a KEK that is not open: %v", err)
	}
	// A change that does not concern the staged KEK keeps the reason.
	if err := n.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := k.AtLeast(9)
		return []*keyring.Keyring{next}, err
	}); err != nil {
		t.Fatal(err)
	}
	wantRefusal(t, n.State().Staged, seal.CauseEpoch, "revoked")
	delete(n.wrapper.verdicts, "staged")
	n.mustOpen() // a reload
	n.decrypts(e)
	if s := n.State(); s.Staged != nil {
		t.Error(s.Staged)
	}
}

// TestStagedSlotsPassTheGate: no staged slot is opened if the gate refuses.
func TestStagedSlotsPassTheGate(t *testing.T) {
	n, _ := stagedNode(t)
	n.gate.set(seal.Errorf(seal.CauseBootPolicy, "x", "another boot"))
	wantRefusal(t, n.Unlock(ctx), seal.CauseBootPolicy)
	wantSteps(t, n.steps.take(), "gate")
	fallback := n.fallback()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	k, err := keyring.New(seal.ClusterID{1}, kek, []seal.Slot{fallback.slot(kek, "")}, nil, now)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	next, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	staged, err := k.Stage(next, []seal.Slot{n.wrapper.slot(next, "staged")}, now)
	if err != nil {
		t.Fatal(err)
	}
	defer staged.Close()
	n.put(staged.Marshal())
	if err := n.anchor.Save(ctx, staged.Anchor()); err != nil {
		t.Fatal(err)
	}
	n.cfg.Ungated = func(kind string) bool { return kind == "vault" }
	n.restart()
	n.mustOpen()
	wantRefusal(t, n.State().Staged, seal.CauseBootPolicy, "another boot")
}

// TestRotationAfterOneThatWasInterrupted: a rotation retires the KEK that an
// interrupted one left staged, and drops it if it does not open.
func TestRotationAfterOneThatWasInterrupted(t *testing.T) {
	for _, opens := range []bool{true, false} {
		n, e := stagedNode(t)
		if !opens {
			n.wrapper.verdicts["staged"] = seal.Errorf(seal.CauseEpoch, "x", "revoked")
		}
		n.mustOpen()
		former := n.encrypt()
		if err := n.rotate(); err != nil {
			t.Fatal(err)
		}
		k, _ := n.Keyring()
		if k.Holds(e.id) != opens || !k.Holds(former.id) || k.StagedID() != "" || k.CurrentID() == former.id {
			t.Errorf("opens %v: %+v", opens, k.Info())
		}
		if s := n.State(); s.Staged != nil {
			t.Error(s.Staged)
		}
		n.decrypts(former)
		n.restart()
		n.mustOpen()
		n.decrypts(former)
		if opens {
			n.decrypts(e)
		}
	}
}
