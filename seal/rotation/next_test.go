package rotation_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

// shared returns a keyring of format 2 with three nodes and nothing staged.
func shared(t testing.TB) *keyring.Keyring {
	t.Helper()
	keep := keeper(t)
	kek := newKEK(t)
	k := keep(keyring.New(seal.ClusterID{1}, kek, []seal.Slot{(&wrapper{name: "recovery"}).slot(kek, "")}, []keyring.Node{{Name: "a"}}, now))
	k = keep(k.Upgrade(keyring.Node{Name: "a"}))
	for _, name := range []string{"b", "c"} {
		k = keep(k.WithNode(keyring.Node{Name: name}, now))
	}
	return keep(k.InCluster())
}

func keeper(t testing.TB) func(*keyring.Keyring, error) *keyring.Keyring {
	return func(k *keyring.Keyring, err error) *keyring.Keyring {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(k.Close)
		return k
	}
}

// in returns the record of a node that is in step and settled on k.
func in(k *keyring.Keyring, node string) *keyring.VerifiedRecord {
	id := k.CurrentID()
	return &keyring.VerifiedRecord{KeyID: id, Record: keyring.Record{Node: node, Formats: []int{1, 2}, Revision: k.Revision(), Anchored: id, Announced: id, Encrypted: id}}
}

func step(s rotation.Step) string {
	out := string(s.Do)
	for _, m := range s.Missing {
		out += fmt.Sprintf(" [%s: %s]", m.Node, m.Why)
	}
	return out
}

// TestNext: each node that is missing is named, with the reason.
func TestNext(t *testing.T) {
	keep := keeper(t)
	k := shared(t)
	kek := newKEK(t)
	staged := keep(k.Stage(kek, []seal.Slot{(&wrapper{name: "recovery"}).slot(kek, "")}, now))
	active := keep(staged.Activate(now))
	all := func(k *keyring.Keyring, change func(r *keyring.VerifiedRecord)) (out []*keyring.VerifiedRecord) {
		for _, name := range []string{"c", "b", "a"} {
			out = append(out, in(k, name))
		}
		if change != nil {
			change(out[1]) // of b
		}
		return out
	}
	acknowledged := func(change func(r *keyring.VerifiedRecord)) []*keyring.VerifiedRecord {
		rs := all(staged, nil)
		for _, r := range rs {
			r.Acknowledged, r.Proven = staged.StagedID(), true
		}
		if change != nil {
			change(rs[1])
		}
		return rs
	}
	other := seal.KeyID("k1-other")
	for name, c := range map[string]struct {
		k       *keyring.Keyring
		replace seal.KeyID
		records []*keyring.VerifiedRecord
		want    string
	}{
		"all in step, and to be rotated":   {k, k.CurrentID(), all(k, nil), "stage"},
		"all in step, and only watched":    {k, "", all(k, nil), "settled"},
		"replaced already":                 {active, k.CurrentID(), all(active, nil), "settled"},
		"no records":                       {k, k.CurrentID(), nil, "wait [a: no record] [b: no record] [c: no record]"},
		"one has not followed":             {k, k.CurrentID(), all(k, func(r *keyring.VerifiedRecord) { r.Revision-- }), "wait [b: not followed]"},
		"one is ahead":                     {k, k.CurrentID(), all(k, func(r *keyring.VerifiedRecord) { r.Revision++ }), "wait [b: not followed]"},
		"one has not, and it is watched":   {k, "", all(k, func(r *keyring.VerifiedRecord) { r.Revision-- }), "settled"},
		"an old binary":                    {k, k.CurrentID(), all(k, func(r *keyring.VerifiedRecord) { r.Formats = []int{1} }), "wait [b: does not read]"},
		"a record under a former KEK":      {active, "", all(active, func(r *keyring.VerifiedRecord) { r.KeyID = k.CurrentID() }), "wait [b: not followed]"},
		"another anchor":                   {active, "", all(active, func(r *keyring.VerifiedRecord) { r.Anchored = k.CurrentID() }), "wait [b: anchor]"},
		"another announced":                {active, "", all(active, func(r *keyring.VerifiedRecord) { r.Announced = k.CurrentID() }), "wait [b: announces another]"},
		"staged, nobody acknowledged":      {staged, k.CurrentID(), all(staged, nil), "wait [a: not acknowledged] [b: not acknowledged] [c: not acknowledged]"},
		"staged, all acknowledged":         {staged, k.CurrentID(), acknowledged(nil), "activate"},
		"staged, all, only watched":        {staged, "", acknowledged(nil), "activate"},
		"staged, one without proof":        {staged, "", acknowledged(func(r *keyring.VerifiedRecord) { r.Proven = false }), "wait [b: not acknowledged]"},
		"staged, one for another KEK":      {staged, "", acknowledged(func(r *keyring.VerifiedRecord) { r.Acknowledged = other }), "wait [b: not acknowledged]"},
		"staged, one withdrew":             {staged, "", acknowledged(func(r *keyring.VerifiedRecord) { r.Acknowledged = "" }), "wait [b: not acknowledged]"},
		"staged, one of an unknown node":   {staged, "", acknowledged(func(r *keyring.VerifiedRecord) { r.Node = "x" }), "wait [b: no record]"},
		"staged, one has an old binary":    {staged, "", acknowledged(func(r *keyring.VerifiedRecord) { r.Formats = nil }), "wait [b: does not read]"},
		"staged, one lags but has the KEK": {staged, "", acknowledged(func(r *keyring.VerifiedRecord) { r.Revision = 1 }), "activate"},
	} {
		got := step(rotation.Next(c.k, c.replace, c.records))
		for _, word := range strings.FieldsFunc(c.want, func(r rune) bool { return r == '[' || r == ']' }) {
			node, why, found := strings.Cut(word, ": ")
			if strings.TrimSpace(word) != "" && (!strings.Contains(got, strings.TrimSpace(node)) || found && !strings.Contains(got, why)) {
				t.Errorf("%s: %s, want %s", name, got, c.want)
			}
		}
		if strings.Count(got, "[") != strings.Count(c.want, "[") || strings.Fields(got)[0] != strings.Fields(c.want)[0] {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
	if m := rotation.Encrypting(active, all(active, nil)); len(m) != 0 {
		t.Errorf("%v", m)
	}
	for why, change := range map[rotation.Why]func(r *keyring.VerifiedRecord){
		rotation.WhyNotEncrypted: func(r *keyring.VerifiedRecord) { r.Encrypted = k.CurrentID() },
		rotation.WhyNotAnnounced: func(r *keyring.VerifiedRecord) { r.Announced = k.CurrentID() },
		rotation.WhyNotFollowed:  func(r *keyring.VerifiedRecord) { r.KeyID = k.CurrentID() },
	} {
		if m := rotation.Encrypting(active, all(active, change)); len(m) != 1 || m[0] != (rotation.Missing{Node: "b", Why: why}) {
			t.Errorf("%v, want %s", m, why)
		}
	}
	if m := rotation.Encrypting(active, all(active, func(r *keyring.VerifiedRecord) { r.Revision-- })); len(m) != 1 || m[0] != (rotation.Missing{Node: "b", Why: rotation.WhyNotFollowed}) {
		t.Errorf("a node that has not followed the present revision: %v", m)
	}
	if m := rotation.Encrypting(active, all(active, nil)[:1]); len(m) != 2 {
		t.Errorf("%v", m)
	}
}
