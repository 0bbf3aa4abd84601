package lifecycle

import (
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
)

func recoverySlot(t *testing.T, n *node.Node, recipient string) (seal.Slot, error) {
	t.Helper()
	w, err := recovery.NewWrapper(n.Memory, []string{recipient})
	if err != nil {
		return seal.Slot{}, err
	}
	return w.Wrap(t.Context(), open(t, n).KEK())
}

// pair returns a keyring of cp-1 and cp-2, as the named node holds it.
func pair(t *testing.T, name string) *keyring.Keyring {
	t.Helper()
	keep := func(k *keyring.Keyring, err error) *keyring.Keyring {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { k.Close() })
		return k
	}
	one := nodetest.Keyring(t, seal.Slot{Type: seal.TypeRecovery, Data: []byte("{}")})
	up := keep(one.Upgrade(keyring.Node{Name: "cp-1"}))
	two := keep(up.WithNode(keyring.Node{Name: "cp-2"}, time.Now()))
	return keep(two.OnNode(name, nil, nil))
}

// TestSeveralRotate: one node of several does not replace the KEK of all alone.
func TestSeveralRotate(t *testing.T) {
	k := pair(t, "cp-1")
	_, err := rotateKeyring(t.Context(), nodetest.Holding(t, "cp-1", k), k, rotateOptions{})
	refuses(t, "rotate", err, "the keyring has 2 nodes", "start kleidi serve, and run kleidi rotate there")
}

// TestAsItWas: a keyring of several nodes comes back unchanged, and only on the node whose
// copy it is.
func TestAsItWas(t *testing.T) {
	k := pair(t, "cp-1")
	n := nodetest.New(t, nodetest.Opens(seal.TypePKCS11))
	same, err := asItWas(n, k, admin.RestoreRequest{})
	if err != nil || len(same) != 1 || same[0].CurrentID() != k.CurrentID() || same[0].Revision() != k.Revision() {
		t.Fatalf("%v, %v", same, err)
	}
	defer same[0].Close()
	_, err = asItWas(n, k, admin.RestoreRequest{SkipSlots: []string{"recovery"}})
	refuses(t, "skip", err, "leave --skip-slot out")
	_, err = asItWas(n, pair(t, "cp-2"), admin.RestoreRequest{})
	refuses(t, "another node's", err, "the copy of another node than cp-1", "restore it with --identity-file")
}

// TestAsThisNode: with the recovery identity, the copy of any node becomes this node's,
// without the other node's slots, if the keyring lists this node.
func TestAsThisNode(t *testing.T) {
	for name, row := range map[string]struct {
		here, copyOf, self string
	}{
		"its own":            {"cp-1", "cp-1", "cp-1"},
		"another node's":     {"cp-1", "cp-2", "cp-1"},
		"of an unlisted one": {"cp-9", "cp-2", "cp-2"},
	} {
		k, err := asThisNode(nodetest.New(t, nodetest.Named(row.here)), pair(t, row.copyOf))
		if err != nil {
			t.Fatal(err)
		}
		if self, ok := k.Self(); !ok || self.Name != row.self {
			t.Errorf("%s: the copy of %s, want of %s", name, self.Name, row.self)
		}
		k.Close()
	}
}

// TestRaise: the keyring of one node goes up to the revision that the node last trusted. One
// of several nodes keeps its revision, unless this node makes the revisions.
func TestRaise(t *testing.T) {
	one, seat, other := nodetest.Keyring(t, seal.Slot{Type: seal.TypeRecovery, Data: []byte("{}")}), pair(t, "cp-1"), pair(t, "cp-2")
	for name, row := range map[string]struct {
		k     *keyring.Keyring
		above uint64 // its own revision
		same  bool
		says  string
	}{
		"one node":            {one, 5, false, ""},
		"several, not behind": {other, 0, true, ""},
		"several, behind":     {other, 5, false, "approve this node again and have it join"},
		"the seat, behind":    {seat, 5, false, ""},
	} {
		want := row.k.Revision() + row.above
		k, err := raise(row.k, want)
		if row.says != "" {
			refuses(t, name, err, row.says)
			continue
		}
		if err != nil || k.Revision() < want || (k == row.k) != row.same {
			t.Errorf("%s: %v, %v", name, k, err)
			continue
		}
		if k != row.k {
			k.Close()
		}
	}
}

// TestAlone: on one node of several, a recovery without a TPM, or on another node's copy,
// has nothing to seal to.
func TestAlone(t *testing.T) {
	self := keyring.Node{Name: "cp-1"}
	if _, err := renewAlone(t.Context(), nodetest.New(t, nodetest.Opens(seal.TypePKCS11)), nil, pair(t, "cp-1"), self, nil); err == nil || !strings.Contains(err.Error(), "unlock.order names no TPM") {
		t.Errorf("without a TPM: %v", err)
	}
	_, err := renewAlone(t.Context(), nodetest.New(t), nil, pair(t, "cp-2"), self, nil)
	refuses(t, "another node's", err, "the keyring is not node cp-1's", "have it join")
	_, err = renewAlone(t.Context(), nodetest.New(t, nodetest.Named("cp-2")), nil, pair(t, "cp-2"), keyring.Node{Name: "cp-2", EK: "sha256:1"}, nil)
	refuses(t, "another TPM", err, "kleidi node approve cp-2 --ek EK --replace")
}

// TestReportAborted: a rotation that this node's new TPM has ended is told on one node of
// several. A keyring of one node has ended it by making the staged KEK current, and another after it.
func TestReportAborted(t *testing.T) {
	one := nodetest.Keyring(t, seal.Slot{Type: seal.TypeRecovery, Data: []byte("{}")})
	two := pair(t, "cp-1")
	for name, row := range map[string]struct {
		staged seal.KeyID
		now    *keyring.Keyring
		told   bool
	}{
		"several": {"k1-gone", two, true}, "no rotation": {"", two, false}, "it is current": {two.CurrentID(), two, false}, "one node": {"k1-gone", one, false},
	} {
		if said := reportAborted(row.staged, row.now); (len(said) > 0) != row.told {
			t.Errorf("%s: %q", name, said)
		}
	}
}
