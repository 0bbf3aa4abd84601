package completion

import (
	"slices"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// TestWords: each kind of word is found in a stored keyring, and a node is never completed
// where only another one is meant.
func TestWords(t *testing.T) {
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	k, err := keyring.New(seal.ClusterID{1}, kek, []seal.Slot{{Type: seal.TypeRecovery, Data: []byte("{}")}}, []keyring.Node{{Name: "cp-1"}, {Name: "cp-2"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	u, err := keyring.Parse(k.Marshal())
	if err != nil {
		t.Fatal(err)
	}
	view, current := slotview.Reader{Node: "cp-1"}, string(u.CurrentID())
	for _, row := range []struct {
		name  string
		words Words
		want  []string
	}{
		{"slots", SlotNames, []string{"recovery"}},
		{"TPMs that owe", UnrevokedEKs, nil},
		{"signers", Signers, nil},
		{"key IDs", KeyIDs, []string{current}},
		{"current", CurrentKeyID, []string{current}},
		{"retired", RetiredKeyIDs, nil},
		{"cluster", ClusterID, []string{seal.ClusterID{1}.String()}},
		{"other nodes", OtherNodes, []string{"cp-2"}},
		{"this node", ThisNode, []string{"cp-1"}},
	} {
		if got := row.words(view, u); !slices.Equal(got, row.want) {
			t.Errorf("%s: %q, want %q", row.name, got, row.want)
		}
	}
}
