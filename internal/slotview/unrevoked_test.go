package slotview

import (
	"fmt"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

func tpmSlot(node, ek, srk string, index, atMost int) seal.Slot {
	return seal.Slot{Type: seal.TypeTPM, Node: node, Data: fmt.Appendf(nil, `{"ek":%q,"srk":%q,"epoch":{"index":%d,"atMost":%d}}`, ek, srk, index, atMost)}
}

// TestOwing lists the revocations that are owed when slots replace others.
func TestOwing(t *testing.T) {
	r := Reader{Node: "a"}
	other := seal.Slot{Type: seal.TypeTPM, Node: "a", Data: []byte(`{"ek":"E","srk":"aa","epoch":{"index":1,"atMost":4},"use":"next"}`)}
	recovery := seal.Slot{Type: seal.TypeRecovery, Data: []byte("{}")}
	for name, c := range map[string]struct {
		before, after []seal.Slot
		owed          string // EK:index:atMost of each
		revokes       bool
	}{
		"a later epoch of the same counter": {[]seal.Slot{tpmSlot("a", "E", "aa", 1, 4)}, []seal.Slot{tpmSlot("a", "E", "aa", 1, 5)}, "", true},
		"the same epoch":                    {[]seal.Slot{tpmSlot("a", "E", "aa", 1, 4), other}, []seal.Slot{other}, "E:1:4 ", false},
		"an earlier epoch: it went back":    {[]seal.Slot{tpmSlot("a", "E", "aa", 1, 40)}, []seal.Slot{tpmSlot("a", "E", "aa", 1, 2)}, "E:1:40 ", false},
		"another counter of the same TPM":   {[]seal.Slot{tpmSlot("a", "E", "aa", 1, 4)}, []seal.Slot{tpmSlot("a", "E", "aa", 2, 5)}, "E:1:4 ", false},
		"another TPM":                       {[]seal.Slot{tpmSlot("a", "E", "aa", 1, 4)}, []seal.Slot{tpmSlot("a", "F", "bb", 1, 5)}, "E:1:4 ", false},
		"the same TPM, cleared":             {[]seal.Slot{tpmSlot("a", "E", "aa", 1, 4)}, []seal.Slot{tpmSlot("a", "E", "bb", 1, 5)}, "", true},
		"no TPM any more":                   {[]seal.Slot{tpmSlot("a", "E", "aa", 1, 4), recovery}, []seal.Slot{recovery}, "E:1:4 ", false},
		"two slots of one counter are one":  {[]seal.Slot{tpmSlot("a", "E", "aa", 1, 4), tpmSlot("a", "E", "aa", 1, 6)}, nil, "E:1:6 ", false},
		"another node's slots are its own":  {[]seal.Slot{tpmSlot("b", "E", "aa", 1, 4)}, nil, "", false},
		"nothing of a TPM":                  {[]seal.Slot{recovery}, []seal.Slot{recovery}, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			after, err := r.Owing(c.before, c.after)
			if err != nil {
				t.Fatal(err)
			}
			if got := owedBy(r, after); got != c.owed {
				t.Errorf("owed: %q, want %q", got, c.owed)
			}
			if got := r.Revokes(c.before, after); got != c.revokes {
				t.Errorf("Revokes is %v", got)
			}
			again, err := r.Owing(after, after)
			if err != nil || owedBy(r, again) != c.owed {
				t.Errorf("carried on, it owes %q, %v", owedBy(r, again), err)
			}
			twice, err := r.Owing(append(after, after...), WithoutDebts(after))
			if err != nil || owedBy(r, twice) != c.owed && c.owed != "" {
				t.Errorf("seen twice, it owes %q, %v", owedBy(r, twice), err)
			}
		})
	}
}

func owedBy(r Reader, slots []seal.Slot) (owed string) {
	for _, d := range r.Debts(slots) {
		owed += fmt.Sprintf("%s:%d:%d ", d.EK, d.Index, d.AtMost)
	}
	return owed
}

// TestDebtsAreBounded: the debts do not outgrow their slot, and the latest ones stay.
func TestDebtsAreBounded(t *testing.T) {
	r := Reader{Node: "a"}
	var slots []seal.Slot
	for i := range 2 * maxDebts {
		before := append(slots, tpmSlot("a", fmt.Sprintf("sha256:%064d", i), fmt.Sprintf("%068d", i), 1, 1))
		var err error
		if slots, err = r.Owing(before, nil); err != nil {
			t.Fatal(err)
		}
	}
	all := r.Debts(slots)
	if len(all) != maxDebts || all[len(all)-1].EK != fmt.Sprintf("sha256:%064d", 2*maxDebts-1) {
		t.Errorf("%d debts, the last is of %s", len(all), all[len(all)-1].EK)
	}
	if n := len(slots[0].Data); n > seal.MaxSlotData {
		t.Errorf("they take %d bytes", n)
	}
}
