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
