package keyring

import (
	"slices"
	"strings"
	"testing"
)

// TestFormer: a removed node is named until another KEK is current, and so is a node whose
// machine was replaced.
func TestFormer(t *testing.T) {
	ok := must[*Keyring](t)
	a, _ := cluster2(t)
	three := ok(ok(a.WithNode(Node{Name: "cp-3"}, now)).WithNode(Node{Name: "cp-0"}, now))
	gone := ok(three.WithoutNode("cp-3", "cp-0"))
	if i := gone.Info(); len(i.Nodes) != 2 || !slices.Equal(i.Former, []string{"cp-0", "cp-3"}) || gone.Revision() != three.Revision()+1 {
		t.Errorf("%+v", i)
	}
	again := ok(ok(gone.WithNode(Node{Name: "cp-3"}, now)).WithoutNode("cp-3"))
	if i := again.Info(); !slices.Equal(i.Former, []string{"cp-0", "cp-3"}) {
		t.Errorf("removed twice: %q", i.Former)
	}
	first := Node{Name: "cp-4", EK: "sha256:" + strings.Repeat("1", 64), SRK: []byte("first"), EpochIndex: FirstEpochIndex}
	cleared, other := first, first
	cleared.SRK, other.EK = []byte("cleared"), "sha256:"+strings.Repeat("2", 64)
	if i := ok(ok(three.WithNode(first, now)).WithNode(cleared, now)).Info(); len(i.Former) != 0 {
		t.Errorf("a cleared TPM: %q", i.Former)
	}
	if i := ok(ok(three.WithNode(first, now)).WithNode(other, now)).Info(); !slices.Equal(i.Former, []string{"cp-4"}) {
		t.Errorf("another machine: %q", i.Former)
	}
	staged := ok(ok(gone.Stage(newKEK(t, 61), sharedSlots("s"), now)).WithOwnSlots(gone.OwnSlots(), tpmSlots("cp-1", "n")))
	if i := staged.Info(); len(i.Former) != 2 {
		t.Errorf("staged: %q", i.Former)
	}
	aborted := ok(staged.Abort(now))
	if i := aborted.Info(); len(i.Former) != 2 {
		t.Errorf("aborted: %q", i.Former)
	}
	if i := ok(staged.Activate(now)).Info(); len(i.Former) != 0 {
		t.Errorf("another KEK is current: %q", i.Former)
	}
	if _, err := three.WithoutNode("cp-3", "cp-1"); err == nil {
		t.Error("a node removes itself")
	}
}

// TestReplacedWhileStaged: a replaced machine may know the staged KEK, which therefore never
// becomes current. It stays readable, as after Abort.
func TestReplacedWhileStaged(t *testing.T) {
	ok := must[*Keyring](t)
	a, b := cluster2(t)
	staged := acknowledge(t, ok(ok(a.WithNode(entry("cp-4", "d"), now)).Stage(newKEK(t, 61), imports(), now)), 61)
	id := staged.StagedID()
	next := ok(staged.WithNode(entry("cp-4", "e"), now))
	i := next.Info()
	if i.Staged != nil || !slices.Equal(i.Former, []string{"cp-4"}) || next.Revision() != staged.Revision()+1 || len(i.Retired) != 1 || i.Retired[0].KeyID != id || !i.Retired[0].Unused || !next.Holds(id) {
		t.Errorf("%+v", i)
	}
	if _, err := next.Activate(now); err == nil {
		t.Error("the staged KEK becomes current")
	}
	cleared := entry("cp-4", "d")
	cleared.SRK = []byte("cleared")
	for name, n := range map[string]Node{"another node": entry("cp-5", "f"), "a cleared TPM": cleared} {
		if next := ok(staged.WithNode(n, now)); next.StagedID() != id || !next.Holds(id) || len(next.Info().Former) != 0 {
			t.Errorf("%s: %+v", name, next.Info())
		}
	}
	// Where the staged KEK is not open it can't be retired. Only a new TPM of this very node may
	// be the reason.
	b = ok(b.Follow(published(t, ok(a.WithNode(entry("cp-4", "d"), now))), nil))
	closed := ok(b.Follow(published(t, staged), nil))
	if closed.Holds(id) {
		t.Fatal("the staged KEK is open")
	}
	if _, err := closed.WithNode(entry("cp-4", "e"), now); err == nil || !strings.Contains(err.Error(), "which may know the staged KEK: abort: the staged KEK "+string(id)+" is not open here") {
		t.Errorf("not open: %v", err)
	}
	if next := ok(closed.WithNode(entry("cp-2", "e"), now)); next.StagedID() != id || !slices.Equal(next.Info().Former, []string{"cp-2"}) {
		t.Errorf("this node's own TPM: %+v", next.Info())
	}
}
