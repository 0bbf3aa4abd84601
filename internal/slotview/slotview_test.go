package slotview_test

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
)

// slots makes slots from words: TYPE, TYPE@NODE, and -TYPE for a slot that a rotation
// left out. Their data makes them distinct and opens nothing.
func slots(t *testing.T, words ...string) []seal.Slot {
	t.Helper()
	var all []seal.Slot
	for i, word := range words {
		kind, left := strings.CutPrefix(word, "-")
		kind, node, _ := strings.Cut(kind, "@")
		s := seal.Slot{Type: kind, Node: node, Data: []byte(`{"number":` + string(rune('0'+i)) + `}`)}
		if left {
			var err error
			if s, err = slotview.Skip(s); err != nil {
				t.Fatal(err)
			}
		}
		all = append(all, s)
	}
	return all
}

func reader(order ...string) slotview.Reader { return slotview.Reader{Node: "cp-1", Order: order} }

func TestNames(t *testing.T) {
	for _, tc := range []struct{ slots, want []string }{
		{[]string{"tpm@cp-1", "recovery"}, []string{`tpm`, `recovery`}},
		{[]string{"tpm@cp-1", "recovery", "tpm@cp-1", "recovery"}, []string{`tpm-[0-9a-f]{4}`, `recovery-[0-9a-f]{4}`, `tpm-[0-9a-f]{4}`, `recovery-[0-9a-f]{4}`}},
		{[]string{"recovery", "-recovery", "-pkcs11"}, []string{`recovery-[0-9a-f]{4}`, `recovery-[0-9a-f]{4}`, `pkcs11`}}, // a slot that was left out keeps its type
	} {
		list := slots(t, tc.slots...)
		names := slotview.Names(list)
		for i, name := range names {
			if !regexp.MustCompile(`^` + tc.want[i] + `$`).MatchString(name) {
				t.Errorf("%v: %v, want %v", tc.slots, names, tc.want)
			}
			if at, err := slotview.Find(list, name); err != nil || at != i {
				t.Errorf("%v: %s is found at %d, %v", tc.slots, name, at, err)
			}
		}
	}
	_, err := slotview.Find(slots(t, "tpm@cp-1", "recovery"), "vault")
	if err == nil || !strings.Contains(err.Error(), `there is no slot "vault", but tpm, recovery; see kleidi slot list`) {
		t.Error(err)
	}
}

// TestNamesStay: after the removal of any slot, the former names mean the former slots,
// even if slots have the same binding, and whatever KEK they hold.
func TestNamesStay(t *testing.T) {
	data := func(kind, binding, kek string) seal.Slot {
		return seal.Slot{Type: kind, Data: json.RawMessage(`{` + binding + `,"ciphertext":"` + kek + `"}`)}
	}
	var before, rotated []seal.Slot
	for _, s := range []struct{ kind, binding string }{
		{"recovery", `"recipients":["age1a"]`}, {"recovery", `"recipients":["age1b"]`}, {"recovery", `"recipients":["age1b"]`},
		{"pkcs11", `"key":{"label":"a"},"token":{"label":"a"}`}, {"vault", `"key":"a","mount":"a"`}, {"vault", `"key":"b","mount":"a"`},
		{"tpm", `"bank":"sha256","pcrs":{"7":"00"}`}, {"tpm", `"bank":"sha256","pcrs":{"7":"01"}`}, {"tpm", `"bank":"sha256","pcrs":{"7":"01"},"resets":{"atMost":1}`},
	} {
		before = append(before, data(s.kind, s.binding, string(rune('a'+len(before)))))
		rotated = append(rotated, data(s.kind, s.binding, string(rune('A'+len(rotated)))))
	}
	names := slotview.Names(before)
	for i, name := range names {
		for gone := range before {
			rest := slices.Delete(slices.Clone(before), gone, gone+1)
			at, err := slotview.Find(rest, name)
			switch same := err == nil && slotview.Identity(rest[at]) == slotview.Identity(before[i]); {
			case i == gone && err == nil:
				t.Errorf("%s is gone, and its name means %s", name, rest[at].Data)
			case i != gone && !same:
				t.Errorf("%s without slot %d: %v", name, gone, err)
			}
		}
		if twins := i == 1 || i == 2; !twins {
			if at, err := slotview.Find(rotated, name); err != nil || at != i {
				t.Errorf("%s after a rotation: slot %d, %v", name, at, err)
			}
		}
	}
	for _, name := range []string{"recovery", "vault", "tpm", names[1][:len("recovery-")+3], "recovery-"} {
		if at, err := slotview.Find(before, name); err == nil {
			t.Errorf("%q is taken for slot %d", name, at)
		}
	}
	if at, err := slotview.Find(before, names[0]+slotview.IDs(before)[0][4:]); err != nil || at != 0 {
		t.Errorf("the whole ID: slot %d, %v", at, err)
	}
}

func TestIsLastRecovery(t *testing.T) {
	list := slots(t, "recovery", "tpm@cp-1", "recovery", "-recovery")
	for _, tc := range []struct {
		gone []int
		want bool
	}{{nil, false}, {[]int{0}, false}, {[]int{1, 3}, false}, {[]int{0, 2}, true}, {[]int{0, 1, 2}, true}} {
		if got := slotview.IsLastRecovery(list, tc.gone...); got != tc.want {
			t.Errorf("without %v: %t", tc.gone, got)
		}
	}
}

func TestMissingOf(t *testing.T) {
	since := `,"since":"2026-11-01T00:00:00Z"`
	for data, want := range map[string]string{
		`{"type":"tpm"` + since + `}`:               "tpm",
		`{"type":"tpm-and-vault"` + since + `}`:     "tpm-and-vault",
		`{"type":"recovery"}`:                       "recovery",
		`{"type":"` + strings.Repeat("x", 9) + `"}`: "", // not a type of ours: these unauthenticated bytes would be shown
		`{"type":"skipped"}`:                        "",
		`{}`:                                        "",
		`[`:                                         "",
	} {
		s := seal.Slot{Type: seal.TypeSkipped, Data: []byte(data)}
		d, ok := slotview.MissingOf(s)
		if ok != (want != "") || ok && d.Type != want {
			t.Errorf("%s: %+v, %v", data, d, ok)
		}
		wantType := want
		if want == "" {
			wantType = seal.TypeSkipped
		}
		if got := slotview.TypeOf(s); got != wantType {
			t.Errorf("%s: type %s, want %s", data, got, wantType)
		}
	}
	if _, ok := slotview.MissingOf(seal.Slot{Type: seal.TypeTPM, Data: []byte(`{"type":"tpm"}`)}); ok {
		t.Error("a slot of the TPM is taken for a missing one")
	}
}

// TestSkip: the placeholder of a skipped slot keeps its type, node and time, and
// skipping the slot again changes nothing.
func TestSkip(t *testing.T) {
	before := time.Now().Add(-time.Second)
	s, err := slotview.Skip(seal.Slot{Type: seal.TypePKCS11, Node: "cp-1", Data: []byte("{}")})
	if err != nil {
		t.Fatal(err)
	}
	d, ok := slotview.MissingOf(s)
	if !ok || d.Type != seal.TypePKCS11 || s.Node != "cp-1" || d.Since.Before(before) {
		t.Errorf("%+v %+v %v", s, d, ok)
	}
	again, err := slotview.Skip(s)
	if err != nil || slotview.Identity(again) != slotview.Identity(s) {
		t.Errorf("%+v, %v", again, err)
	}
}

// TestWithMissing: each wrapper of unlock.order is shown, whether or not this node has a
// slot of it.
func TestWithMissing(t *testing.T) {
	for _, tc := range []struct{ order, slots, want []string }{
		{[]string{"tpm"}, []string{"tpm@cp-1", "recovery"}, nil},
		{[]string{"tpm", "pkcs11"}, []string{"tpm@cp-1"}, []string{"pkcs11"}},
		{[]string{"tpm"}, []string{"tpm@cp-2"}, []string{"tpm@cp-1"}}, // another node's slot is not this node's
		{[]string{"tpm-and-vault"}, []string{"tpm@cp-1"}, []string{"tpm-and-vault@cp-1"}},
		{[]string{"tpm", "pkcs11"}, []string{"tpm@cp-1", "-pkcs11"}, nil}, // a slot that was left out is already known
		{[]string{"vault"}, nil, []string{"vault"}},
	} {
		list := slots(t, tc.slots...)
		all := reader(tc.order...).WithMissing(list)
		var added []string
		for _, s := range all[len(list):] {
			d, ok := slotview.MissingOf(s)
			if !ok || !d.Since.IsZero() {
				t.Errorf("%v %v: %+v", tc.order, tc.slots, s)
			}
			name := d.Type
			if s.Node != "" {
				name += "@" + s.Node
			}
			added = append(added, name)
		}
		if !slices.Equal(added, tc.want) {
			t.Errorf("%v %v: missing %v, want %v", tc.order, tc.slots, added, tc.want)
		}
	}
}

// TestRemedy: each missing slot comes with the command that makes it.
func TestRemedy(t *testing.T) {
	for _, tc := range []struct {
		missing string
		slots   []string
		want    string
	}{
		{"recovery", []string{"tpm@cp-1"}, "run kleidi slot add recovery --recipient age1…"},
		{"pkcs11", []string{"tpm@cp-1"}, "run kleidi slot add pkcs11 once its backend answers"},
		{"tpm", []string{"vault"}, "run kleidi reseal --new-tpm"},
		{"tpm-and-pkcs11", []string{"vault"}, "run kleidi reseal --new-tpm"},
		{"vault", []string{"tpm-and-pkcs11@cp-1"}, "set unlock.order to the two-of-two that the keyring holds; or, if one wrapper is to be enough, run kleidi slot add vault --break-two-of-two"},
		{"tpm", []string{"tpm-and-vault@cp-1"}, "kleidi reseal --new-tpm --break-two-of-two"},
	} {
		if got := reader().Remedy(slotview.Missing{Type: tc.missing}, slots(t, tc.slots...)); !strings.Contains(got, tc.want) {
			t.Errorf("%s beside %v: %s, want %s", tc.missing, tc.slots, got, tc.want)
		}
	}
}

func TestWhyMissing(t *testing.T) {
	never := slotview.Missing{Type: seal.TypeTPM}
	err := reader("tpm").WhyMissing(never, slots(t, "tpm@cp-2"))
	if seal.CauseOf(err) != seal.CauseNoSlot || !strings.Contains(err.Error(), "if this machine was renamed, set node to its former name; else run kleidi reseal --new-tpm") {
		t.Error(err)
	}
	left := slotview.Missing{Type: seal.TypeVault, Since: time.Now()}
	if err := reader("tpm").WhyMissing(left, slots(t, "tpm@cp-1")); seal.CauseOf(err) != seal.CauseNoSlot || !strings.Contains(err.Error(), "skipped this slot; run kleidi slot add vault") {
		t.Error(err)
	}
}

// TestTwoOfTwoRules: the refusals of each rule, by unlock.order and by the content of
// the keyring.
func TestTwoOfTwoRules(t *testing.T) {
	const both = "tpm-and-pkcs11"
	type verdict struct{ add, addBoth, recovery, seal bool } // allowed?
	for _, tc := range []struct {
		order string
		slots []string
		want  verdict
	}{
		{"tpm", []string{"tpm@cp-1", "recovery"}, verdict{true, true, true, true}},
		{both, []string{both + "@cp-1"}, verdict{false, true, true, true}},
		{both, []string{"-" + both + "@cp-1"}, verdict{false, true, true, true}},                 // a slot that was left out counts as held
		{"tpm", []string{both + "@cp-1"}, verdict{false, true, false, false}},                    // unlock.order no longer names it
		{both, []string{"tpm@cp-1", "recovery"}, verdict{false, true, false, true}},              // not two of two yet
		{"pkcs11", []string{"pkcs11", "tpm-and-vault@cp-2"}, verdict{false, true, false, false}}, // another node's slot counts too
	} {
		r, list := reader(tc.order), slots(t, tc.slots...)
		got := verdict{r.CheckAdd(seal.TypeRecovery, list) == nil, r.CheckAdd(both, list) == nil, r.CheckRecovery(list) == nil, r.CheckSeal(list) == nil}
		if got != tc.want {
			t.Errorf("unlock.order %s, slots %v: %+v, want %+v", tc.order, tc.slots, got, tc.want)
		}
	}
	if err := reader(both).CheckAdd(seal.TypeVault, nil); err == nil || !strings.Contains(err.Error(), "a slot of vault would open the KEK alone") || !strings.Contains(err.Error(), "--break-two-of-two") {
		t.Error(err)
	}
}

// TestReports: the reports after a change. Without a change there is no report.
func TestReports(t *testing.T) {
	const both = "tpm-and-vault"
	list := func(words ...string) []seal.Slot { return slots(t, words...) }
	for name, tc := range map[string]struct {
		got  []string
		want string // "" for none
	}{
		"alone":                {reader("tpm").ReportSingles(nil, list("tpm@cp-1")), ""},
		"alone beside two":     {reader(both).ReportSingles(nil, list(both+"@cp-1", "recovery")), "each of these slots opens the KEK alone: recovery"},
		"alone, two in backup": {reader("tpm").ReportSingles(list(both+"@cp-1"), list("tpm@cp-1")), "opens the KEK alone: tpm"},
		"left out is no way":   {reader(both).ReportSingles(nil, list(both+"@cp-1", "-recovery")), ""},
		"broken":               {reader("tpm").ReportBroken(list(both + "@cp-1")), "TWO OF TWO IS BROKEN"},
		"not broken":           {reader(both).ReportBroken(list(both + "@cp-1")), ""},
		"missing":              {reader("tpm", "pkcs11").ReportMissing(list("tpm@cp-1")), "WITHOUT SLOT pkcs11: the KEK is not wrapped by it; run kleidi slot add pkcs11"},
		"none missing":         {reader("tpm").ReportMissing(list("tpm@cp-1")), ""},
		"completed":            {reader("tpm").ReportCompleted(list("tpm@cp-1"), list("tpm@cp-1", "vault")), "the KEK is wrapped by vault as well"},
		"not completed":        {reader("tpm").ReportCompleted(list("tpm@cp-1", "-vault"), list("tpm@cp-1", "vault")), ""},
		"still named":          {reader("tpm", "vault").ReportStillNamed(list("tpm@cp-1"), "vault"), "or the next rotation makes the slot again"},
		"not named":            {reader("tpm").ReportStillNamed(list("tpm@cp-1"), "vault"), ""},
		"dropped":              {slotview.ReportDropped(list("tpm@cp-1", "vault", "vault"), list("tpm@cp-1")), "the vault slot is gone"},
		"not dropped":          {slotview.ReportDropped(list("tpm@cp-1", "vault"), list("tpm@cp-1", "-vault")), ""},
		"returned":             {reader().ReportReturned(list("vault"), list("tpm@cp-1"), list("tpm@cp-1", "vault")), "slot vault is back, which the replaced keyring did not have"},
		"nothing replaced":     {reader().ReportReturned(list("vault"), nil, list("vault")), ""},
	} {
		if tc.want == "" {
			if len(tc.got) != 0 {
				t.Errorf("%s: %q", name, tc.got)
			}
		} else if len(tc.got) != 1 || !strings.Contains(tc.got[0], tc.want) {
			t.Errorf("%s: %q, want %q", name, tc.got, tc.want)
		}
	}
}

// TestStayBeside: a new slot replaces those of its type; of the recovery slots it
// replaces only a placeholder.
func TestStayBeside(t *testing.T) {
	for _, tc := range []struct {
		slots []string
		kind  string
		want  []string
	}{
		{[]string{"tpm@cp-1", "vault", "recovery"}, "vault", []string{"tpm", "recovery"}},
		{[]string{"tpm@cp-1", "-vault"}, "vault", []string{"tpm"}},
		{[]string{"recovery", "recovery"}, "recovery", slotview.Names(slots(t, "recovery", "recovery"))},
		{[]string{"-recovery", "-recovery", "tpm@cp-1"}, "recovery", []string{"recovery", "tpm"}},
	} {
		if got := slotview.Names(slotview.StayBeside(slots(t, tc.slots...), tc.kind)); !slices.Equal(got, tc.want) {
			t.Errorf("%v beside a new %s: %v, want %v", tc.slots, tc.kind, got, tc.want)
		}
	}
}

// TestKeepMissing: a rotation keeps the placeholders of an earlier one, and nothing
// else.
func TestKeepMissing(t *testing.T) {
	list := slots(t, "-vault", "vault")
	if s, err := (slotview.KeepMissing{}).WrapLike(t.Context(), nil, list[0]); err != nil || slotview.Identity(s) != slotview.Identity(list[0]) {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := (slotview.KeepMissing{}).WrapLike(t.Context(), nil, list[1]); err != seal.ErrNotMine {
		t.Error(err)
	}
}

// TestUnreadable: a slot that can't be parsed is called unreadable, and demands
// nothing.
func TestUnreadable(t *testing.T) {
	r := reader("tpm")
	for _, kind := range []string{seal.TypeTPM, seal.TypeRecovery, seal.TypeTPMAndPKCS11, seal.TypeTPMAndVault} {
		s := seal.Slot{Type: kind, Node: "cp-1", Data: json.RawMessage(`{"x":1}`)}
		if got := r.Binding(s); got != "unreadable" {
			t.Errorf("%s: %q", kind, got)
		}
		if len(r.Demands([]seal.Slot{s})) != 0 || r.Suspends(s) || r.Revoked(s, 1<<40) || r.Use(s) != "" {
			t.Errorf("%s: something is read out of it", kind)
		}
	}
}
