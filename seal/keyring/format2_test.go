package keyring

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// TestBody2 tests bodies whose MAC verifies, because the parser must not rely on the MAC.
func TestBody2(t *testing.T) {
	kek := newKEK(t, 0x81)
	body := string(must[*Untrusted](t)(Parse(golden2(t, "shared.json"))).body)
	edit := func(f func(d *document)) string {
		u := must[*Untrusted](t)(Parse(golden2(t, "shared.json")))
		f(u.doc)
		return string(must[[]byte](t)(encodeBody(u.doc)))
	}
	replace := func(old, with string) string { return strings.Replace(body, old, with, 1) }
	many := func(n int, node string) (out []seal.Slot) {
		for range n {
			out = append(out, seal.Slot{Type: "tpm", Node: node, Data: []byte("{}")})
		}
		return out
	}
	for name, b := range map[string]string{
		"format 3":               replace(`"format":2`, `"format":3`),
		"format 1":               replace(`"format":2`, `"format":1`),
		"format twice":           replace(`"format":2`, `"format":2,"format":2`),
		"format 2 then 1":        replace(`"format":2`, `"format":2,"Format":1`),
		"unknown field":          replace(`"revision"`, `"x":1,"revision"`),
		"unknown in node":        replace(`"epochIndex"`, `"address":"x","epochIndex"`),
		"unknown in retired":     replace(`"unused":true`, `"unused":true,"x":1`),
		"unused is false":        replace(`"unused":true`, `"unused":false`),
		"white space":            body + " ",
		"revision 0":             edit(func(d *document) { d.Revision = 0 }),
		"revision 2^53":          edit(func(d *document) { d.Revision = 1 << 53 }),
		"no commit":              replace(`"commit":"cluster",`, ``),
		"commit elsewhere":       edit(func(d *document) { d.Commit = "etcd" }),
		"commit in the cluster":  edit(func(d *document) { d.Seat = "cp-1" }),
		"no seat":                edit(func(d *document) { d.Commit = CommitLocal }),
		"seat of no node":        edit(func(d *document) { d.Commit, d.Seat = CommitLocal, "cp-9" }),
		"own slot":               edit(func(d *document) { d.Current.Slots[0].Node = "cp-1" }),
		"import for no node":     edit(func(d *document) { d.Staged.Slots[1].Node = "cp-9" }),
		"17 shared slots":        edit(func(d *document) { d.Current.Slots = many(MaxSlots+1, "") }),
		"17 import slots":        edit(func(d *document) { d.Staged.Slots = many(MaxSlots+1, "cp-2") }),
		"slot no object":         edit(func(d *document) { d.Current.Slots[0].Data = []byte(`"x"`) }),
		"slot type":              edit(func(d *document) { d.Current.Slots[0].Type = "../x" }),
		"empty slots":            replace(`"slots":[{"type":"recovery","data":{"name":"current, recovery"}},{"type":"vault","data":{"name":"current, vault"}}]`, `"slots":[]`),
		"key ID":                 edit(func(d *document) { d.Current.KeyID = d.Current.KeyID[:54] }),
		"staged key ID":          edit(func(d *document) { d.Staged.KeyID = d.Staged.KeyID[:54] }),
		"staged is current":      edit(func(d *document) { d.Staged.KeyID = d.Current.KeyID }),
		"retired is current":     edit(func(d *document) { d.Retired[0].KeyID = d.Current.KeyID }),
		"retired is staged":      edit(func(d *document) { d.Retired[0].KeyID = d.Staged.KeyID }),
		"retired twice":          edit(func(d *document) { d.Retired[1].KeyID = d.Retired[0].KeyID }),
		"retired key ID":         edit(func(d *document) { d.Retired[1].KeyID = "k1-" }),
		"257 retired":            edit(func(d *document) { d.Retired = manyRetired(MaxRetired + 1) }),
		"retired short":          edit(func(d *document) { d.Retired[0].Sealed = d.Retired[0].Sealed[1:] }),
		"former node name":       edit(func(d *document) { d.Former = []string{"a/b"} }),
		"former node twice":      edit(func(d *document) { d.Former = []string{"cp-8", "cp-8"} }),
		"former nodes, order":    edit(func(d *document) { d.Former = []string{"cp-9", "cp-8"} }),
		"no nodes":               edit(func(d *document) { d.Nodes, d.Staged.Slots = nil, nil }),
		"65 nodes":               edit(func(d *document) { d.Nodes, d.Staged.Slots = manyNodes(MaxNodes+1), nil }),
		"node name":              edit(func(d *document) { d.Nodes[2].Name = "a/b" }),
		"node twice":             edit(func(d *document) { d.Nodes[2].Name = "cp-1" }),
		"EK twice":               edit(func(d *document) { d.Nodes[1].EK = d.Nodes[0].EK }),
		"SRK twice":              edit(func(d *document) { d.Nodes[1].SRK = d.Nodes[0].SRK }),
		"EK":                     edit(func(d *document) { d.Nodes[1].EK = "sha1:00" }),
		"EK alone":               edit(func(d *document) { d.Nodes[1].SRK, d.Nodes[1].EpochIndex = nil, 0 }),
		"no EK":                  edit(func(d *document) { d.Nodes[1].EK = "" }),
		"no SRK":                 edit(func(d *document) { d.Nodes[1].SRK = nil }),
		"no epoch index":         edit(func(d *document) { d.Nodes[1].EpochIndex = 0 }),
		"long SRK":               edit(func(d *document) { d.Nodes[1].SRK = make([]byte, MaxSRK+1) }),
		"index of the platform":  edit(func(d *document) { d.Nodes[1].EpochIndex = FirstEpochIndex - 1 }),
		"index above the owner":  edit(func(d *document) { d.Nodes[1].EpochIndex = LastEpochIndex + 1 }),
		"index over 32 bits":     replace(`"epochIndex":`, `"epochIndex":1`+strings.Repeat("0", 10)),
		"newline in base64":      replace(`AQEBAQEB`, `AQEB\nAQEB`),
		"added with a time zone": replace(`"added":"2026-11-01T12:00:00Z"`, `"added":"2026-11-01T12:00:00+00:00"`),
		"no added":               replace(`,"added":"2026-11-02T13:00:00Z"`, ``),
		"not UTF-8":              replace("vault\"}", "\xff\"}"),
	} {
		if b == body {
			t.Errorf("%s: the test changes nothing", name)
		}
		if _, err := Parse(forge(t, []byte(b), kek)); seal.CauseOf(err) != seal.CauseKeyringCorrupt {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := Parse(forge(t, []byte(replace(`"format":2`, `"format":3`)), kek))
	wantRefusal(t, err, seal.CauseKeyringCorrupt, "unknown format 3", "reads 1 and 2", "install")
	if _, err := open(forge(t, []byte(body), kek), kek, nil); err != nil {
		t.Errorf("the body that these were made from: %v", err)
	}
}

// TestLimitsOfFormat2AreInclusive: a keyring exactly at a limit parses.
func TestLimitsOfFormat2AreInclusive(t *testing.T) {
	u := must[*Untrusted](t)(Parse(golden2(t, "shared.json")))
	d := u.doc
	d.Nodes, d.Retired, d.Revision = manyNodes(MaxNodes), manyRetired(MaxRetired), MaxRevision
	d.Nodes[0] = Node{Name: "cp-1", EK: "sha256:" + hex64("a"), SRK: make([]byte, MaxSRK), EpochIndex: LastEpochIndex}
	d.Staged.Slots = nil
	for range MaxSlots {
		d.Staged.Slots = append(d.Staged.Slots, seal.Slot{Type: "tpm", Node: "cp-1", Data: []byte("{}")}, seal.Slot{Type: "vault", Data: []byte("{}")})
	}
	d.Current.Slots = nil // a cluster whose nodes have only their TPMs, and no recovery
	if _, err := Parse(forge(t, must[[]byte](t)(encodeBody(d)), newKEK(t, 0x81))); err != nil {
		t.Error(err)
	}
}

// forge2 writes a node's file as an attacker who knows kek would: with MACs that
// verify.
func forge2(t testing.TB, body, section []byte, kek *seal.Secret) []byte {
	t.Helper()
	e := envelope{Body: body, Section: section}
	withKEK(kek, func(b []byte) { e.MAC, e.SectionMAC = bodyMAC(b, body), sectionMAC(b, section) })
	return append(must[[]byte](t)(encode(e)), '\n')
}

// TestSection2 tests own sections whose MAC verifies.
func TestSection2(t *testing.T) {
	kek := newKEK(t, 0x81)
	u := must[*Untrusted](t)(Parse(golden2(t, "keyring.json")))
	section := string(u.section)
	edit := func(f func(s *section2)) string {
		s := must[*section2](t)(parseSection2(u.section))
		f(s)
		return string(must[[]byte](t)(encode(s)))
	}
	replace := func(old, with string) string { return strings.Replace(section, old, with, 1) }
	for name, s := range map[string]string{
		"empty":            "",
		"null":             "null",
		"format":           replace(`"format":2`, `"format":1`),
		"unknown field":    replace(`"node"`, `"x":1,"node"`),
		"other case":       replace(`"keyID"`, `"KeyID"`),
		"white space":      section + " ",
		"other cluster":    edit(func(s *section2) { s.ClusterID[0] ^= 1 }),
		"node name":        edit(func(s *section2) { s.Node = "a/b" }),
		"other node":       edit(func(s *section2) { s.Node = "cp-2" }),
		"no such node":     edit(func(s *section2) { s.Node = "cp-9"; s.Slots = nil }),
		"slot of a node":   edit(func(s *section2) { s.Slots[0].Slot.Node = "cp-2" }),
		"shared slot":      edit(func(s *section2) { s.Slots[0].Slot.Node = "" }),
		"slot type":        edit(func(s *section2) { s.Slots[0].Slot.Type = "" }),
		"slot no object":   edit(func(s *section2) { s.Slots[0].Slot.Data = []byte("1") }),
		"key ID":           edit(func(s *section2) { s.KeyID = "k1-" }),
		"of a retired KEK": edit(func(s *section2) { s.KeyID = u.doc.Retired[0].KeyID }),
		"of the staged":    edit(func(s *section2) { s.KeyID = u.doc.Staged.KeyID }),
		"slot key ID":      edit(func(s *section2) { s.Slots[0].KeyID = "x" }),
		"slot of retired":  edit(func(s *section2) { s.Slots[0].KeyID = u.doc.Retired[0].KeyID }),
		"17 slots": edit(func(s *section2) {
			for range MaxSlots {
				s.Slots = append(s.Slots, s.Slots[0])
			}
		}),
		"big slot": edit(func(s *section2) {
			s.Slots[0].Slot.Data = []byte(`{"a":"` + strings.Repeat("a", seal.MaxSlotData) + `"}`)
		}),
	} {
		if s == section {
			t.Errorf("%s: the test changes nothing", name)
		}
		_, err := Parse(forge2(t, u.body, []byte(s), kek))
		wantRefusal(t, err, seal.CauseKeyringCorrupt, "own section")
	}
	if _, err := open(forge2(t, u.body, u.section, kek), kek, nil); err != nil {
		t.Errorf("the section that these were made from: %v", err)
	}
	// The envelope around the section.
	mac := base64.StdEncoding.EncodeToString(u.sectionMAC)
	file := string(golden2(t, "keyring.json"))
	one := must[*Untrusted](t)(Parse(golden(t, "keyring.json")))
	for name, f := range map[string]string{
		"no MAC":         file[:strings.Index(file, `,"sectionMAC"`)] + "}\n",
		"short MAC":      strings.Replace(file, mac, base64.StdEncoding.EncodeToString(u.sectionMAC[1:]), 1),
		"no section":     strings.Replace(file, `"section":"`+base64.StdEncoding.EncodeToString(u.section)+`",`, ``, 1),
		"empty section":  strings.Replace(string(golden2(t, "shared.json")), "}\n", `,"section":"","sectionMAC":""}`+"\n", 1),
		"beside format1": string(must[[]byte](t)(encode(envelope{one.body, one.mac, u.section, u.sectionMAC}))) + "\n",
	} {
		if f == file {
			t.Errorf("%s: the test changes nothing", name)
		}
		if _, err := Parse([]byte(f)); seal.CauseOf(err) != seal.CauseKeyringCorrupt {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestPlantedSection: boot states that an attacker adds to a node's file are refused,
// even if the attacker knows a retired KEK.
func TestPlantedSection(t *testing.T) {
	u := must[*Untrusted](t)(Parse(golden2(t, "keyring.json")))
	for what, kek := range map[string]*seal.Secret{"nobody": newKEK(t, 5), "a removed node": newKEK(t, 0x01), "an aborted rotation": newKEK(t, 0x41)} {
		e := envelope{Body: u.body, MAC: u.mac, Section: u.section}
		withKEK(kek, func(b []byte) { e.SectionMAC = sectionMAC(b, u.section) })
		_, err := open(append(must[[]byte](t)(encode(e)), '\n'), newKEK(t, 0x81), nil)
		if wantRefusal(t, err, seal.CauseKeyringCorrupt, "node cp-1's own section"); err == nil {
			t.Errorf("the section of %s opens", what)
		}
	}
}

// tpmSlots returns slots of one node's TPM.
func tpmSlots(node string, texts ...string) (out []seal.Slot) {
	for _, text := range texts {
		data, _ := json.Marshal(map[string]string{"name": text})
		out = append(out, seal.Slot{Type: seal.TypeTPM, Node: node, Data: data})
	}
	return out
}

func sharedSlots(text string) []seal.Slot {
	data, _ := json.Marshal(map[string]string{"name": text})
	return []seal.Slot{{Type: seal.TypeRecovery, Data: data}}
}

// entry returns the entry of a node whose TPM is identified by a digit.
func entry(name, digit string) Node {
	return Node{Name: name, EK: "sha256:" + hex64(digit), SRK: bytes.Repeat([]byte(digit), 90), EpochIndex: 0x01804b01, Added: now}
}

// cluster2 returns the keyring of two nodes, as each of them keeps it: the KEK starts
// with byte 1.
func cluster2(t testing.TB) (a, b *Keyring) {
	t.Helper()
	ok := must[*Keyring](t)
	first := ok(New(cluster, newKEK(t, 1), append(tpmSlots("cp-1", "one"), sharedSlots("one")...), nodes, now))
	a = ok(first.Upgrade(entry("cp-1", "a")))
	a = ok(ok(a.WithNode(entry("cp-2", "b"), now)).InCluster())
	b = ok(open(a.Shared(), newKEK(t, 1), nil))
	return a, ok(b.OnNode("cp-2", tpmSlots("cp-2", "two"), nil))
}

// TestUpgrade: format 1 becomes format 2 with all of its content, and opens on the same
// node under the same anchor.
func TestUpgrade(t *testing.T) {
	const here = "here, and not in any base64"
	ok := must[*Keyring](t)
	one := rotate(t, ok(New(cluster, newKEK(t, 1), append(tpmSlots("cp-1", "one"), sharedSlots("one")...), nodes, now)), 40)
	one = ok(one.WithSlots(append(tpmSlots("cp-1", here, "there"), sharedSlots("one")...)))
	anchor := one.Anchor()
	c, id, err := one.Encrypt([]byte("seed"))
	if err != nil {
		t.Fatal(err)
	}
	self := entry("cp-1", "a")
	two := reopen(t, ok(one.Upgrade(self)), newKEK(t, 40), &anchor)
	if p, err := two.Decrypt(id, c); err != nil || string(p) != "seed" {
		t.Errorf("%q, %v", p, err)
	}
	if two.Format() != 2 || two.Revision() != one.Revision()+1 || two.Info().Commit != CommitLocal || two.Info().Seat != "cp-1" || names(two.Slots()) != names(one.Slots()) {
		t.Errorf("%+v", two.Info())
	}
	if names(two.OwnSlots()) != here+"|there" || strings.Contains(string(must[*Untrusted](t)(Parse(two.Shared())).body), here) {
		t.Error("the slots of the TPM are in the shared keyring")
	}
	if one.Shared() != nil || one.Format() != 1 {
		t.Error("format 1 has a shared keyring")
	}
	other := self
	other.EK = "sha256:" + hex64("b")
	staged := ok(one.Stage(newKEK(t, 60), slots("next"), now))
	foreign := ok(ok(one.WithNodes([]Node{{Name: "cp-1", EK: self.EK}, {Name: "cp-2"}}, one.Slots())).WithSlots(one.Slots()))
	noTPM := self
	noTPM.SRK = nil
	for what, err := range map[string]error{
		"of format 2":    errOf(two.Upgrade(self)),
		"another TPM":    errOf(one.Upgrade(other)),
		"another node":   errOf(one.Upgrade(entry("cp-2", "a"))),
		"staged":         errOf(staged.Upgrade(self)),
		"of two nodes":   errOf(foreign.Upgrade(self)),
		"entry half set": errOf(one.Upgrade(noTPM)),
	} {
		if err == nil || !strings.HasPrefix(err.Error(), "upgrade keyring: ") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestOwnSectionIsLocal: a change of a node's own section leaves the shared keyring
// unchanged, including its revision and MAC.
func TestOwnSectionIsLocal(t *testing.T) {
	ok := must[*Keyring](t)
	a, b := cluster2(t)
	if !bytes.Equal(a.Shared(), b.Shared()) || bytes.Equal(a.Marshal(), b.Marshal()) {
		t.Fatal("the two nodes do not share what they should")
	}
	for what, next := range map[string]*Keyring{
		"WithSlots":    ok(b.WithSlots(append(tpmSlots("cp-2", "present", "next"), sharedSlots("one")...))),
		"WithOwnSlots": ok(b.WithOwnSlots(tpmSlots("cp-2", "present", "next"), nil)),
		"OnNode":       ok(b.OnNode("cp-2", tpmSlots("cp-2", "present", "next"), nil)),
	} {
		if !bytes.Equal(next.Shared(), b.Shared()) || next.Anchor() != b.Anchor() {
			t.Errorf("%s changes the shared keyring", what)
		}
		if names(next.OwnSlots()) != "present|next" || names(reopen(t, next, newKEK(t, 1), nil).OwnSlots()) != "present|next" {
			t.Errorf("%s: own slots %q", what, names(next.OwnSlots()))
		}
	}
	if shared := ok(b.WithSlots(append(b.OwnSlots(), sharedSlots("other")...))); shared.Revision() != b.Revision()+1 || names(shared.Slots()) != "two|other" {
		t.Errorf("a shared slot changed: revision %d, slots %q", shared.Revision(), names(shared.Slots()))
	}
	none := ok(open(a.Shared(), newKEK(t, 1), nil))
	for what, err := range map[string]error{
		"another node's slot":      errOf(b.WithSlots(append(tpmSlots("cp-1", "x"), b.Slots()...))),
		"another node's own slot":  errOf(b.WithOwnSlots(tpmSlots("cp-1", "x"), nil)),
		"a shared own slot":        errOf(b.WithOwnSlots(sharedSlots("x"), nil)),
		"a staged slot of nothing": errOf(b.WithOwnSlots(b.OwnSlots(), tpmSlots("cp-2", "x"))),
		"no section":               errOf(none.WithOwnSlots(nil, nil)),
		"no section, own slot":     errOf(none.WithSlots(append(none.Slots(), tpmSlots("cp-2", "x")...))),
		"of no node":               errOf(none.OnNode("cp-9", nil, nil)),
		"of format 1":              errOf(newKeyring(t, 1).OnNode("cp-1", nil, nil)),
		"other nodes":              errOf(b.WithNodes([]Node{entry("cp-2", "b")}, b.Slots())),
		"a node with another TPM":  errOf(b.WithNodes([]Node{entry("cp-1", "a"), entry("cp-2", "c")}, b.Slots())),
	} {
		if err == nil {
			t.Errorf("%s: it is written", what)
		}
	}
}

// TestNodes adds, replaces and removes nodes.
func TestNodes(t *testing.T) {
	ok := must[*Keyring](t)
	a, _ := cluster2(t)
	staged := ok(a.Stage(newKEK(t, 60), append(append(tpmSlots("cp-1", "i1"), tpmSlots("cp-2", "i2")...), sharedSlots("s")...), now))
	three := ok(staged.WithNode(Node{Name: "cp-3"}, now.Add(time.Hour)))
	if got := three.Nodes(); len(got) != 3 || got[2].Name != "cp-3" || !got[2].Added.Equal(now.Add(time.Hour)) || three.Revision() != staged.Revision()+1 {
		t.Errorf("%+v", got)
	}
	cleared := entry("cp-2", "b")
	cleared.SRK = []byte("another")
	replaced := ok(three.WithNode(cleared, now))
	if got := replaced.Nodes(); len(got) != 3 || string(got[2].SRK) != "another" || names(replaced.StagedSlots()) != "i1|s" {
		t.Errorf("%+v, staged slots %q: those for the former TPM are of no use", got, names(replaced.StagedSlots()))
	}
	removed := ok(three.WithoutNode("cp-2"))
	if got := removed.Nodes(); len(got) != 2 || names(removed.StagedSlots()) != "i1|s" || removed.StagedID() != staged.StagedID() {
		t.Errorf("%+v, staged slots %q", got, names(removed.StagedSlots()))
	}
	if names(staged.StagedSlots()) != "i1|i2|s" || len(staged.Nodes()) != 2 {
		t.Error("the keyring that was changed has changed")
	}
	first := newKeyring(t, 1)
	seat := ok(ok(first.WithSlots(sharedSlots("x"))).Upgrade(entry("cp-1", "a")))
	for what, err := range map[string]error{
		"no such node":    errOf(a.WithoutNode("cp-9")),
		"itself":          errOf(a.WithoutNode("cp-1")),
		"same EK":         errOf(a.WithNode(entry("cp-3", "a"), now)),
		"half a TPM":      errOf(a.WithNode(Node{Name: "cp-3", EK: "sha256:" + hex64("d")}, now)),
		"format 1, add":   errOf(first.WithNode(Node{Name: "cp-3"}, now)),
		"format 1, drop":  errOf(newKeyring(t, 1).WithoutNode("cp-1")),
		"in cluster":      errOf(a.InCluster()),
		"format 1, store": errOf(first.InCluster()),
	} {
		if err == nil {
			t.Errorf("%s: it is written", what)
		}
	}
	if handed := ok(seat.InCluster()); handed.Info().Commit != CommitCluster || handed.Info().Seat != "" || seat.Info().Seat != "cp-1" {
		t.Errorf("%+v", handed.Info())
	}
}

// TestRotationOfFormat2: activation drops the import slots, the node's own slots of the
// staged KEK become slots of the current one, and both are in one file.
func TestRotationOfFormat2(t *testing.T) {
	ok := must[*Keyring](t)
	a, _ := cluster2(t)
	staged := ok(a.Stage(newKEK(t, 60), append(append(tpmSlots("cp-1", "i1"), tpmSlots("cp-2", "i2")...), sharedSlots("s")...), now))
	if staged.Acknowledged() {
		t.Error("it is acknowledged before this node has sealed it")
	}
	if _, err := staged.Activate(now); err == nil || !strings.Contains(err.Error(), "no slot of its own") {
		t.Errorf("a KEK is activated that this node could not open: %v", err)
	}
	if _, err := staged.Stage(newKEK(t, 61), sharedSlots("x"), now); err == nil {
		t.Error("a second KEK is staged")
	}
	kept := ok(staged.WithOwnSlots(staged.OwnSlots(), tpmSlots("cp-1", "sealed")))
	if !kept.Acknowledged() || kept.Revision() != staged.Revision() || names(kept.Slots()) != "one|one" || names(kept.StagedSlots()) != "sealed|i1|i2|s" {
		t.Errorf("slots %q, staged %q", names(kept.Slots()), names(kept.StagedSlots()))
	}
	anchor := a.Anchor()
	active := reopen(t, ok(kept.Activate(now)), newKEK(t, 60), &anchor)
	if names(active.Slots()) != "sealed|s" || active.StagedID() != "" || len(active.Info().Retired) != 1 || active.Info().Retired[0].Unused {
		t.Errorf("%+v, slots %q", active.Info(), names(active.Slots()))
	}
	aborted := reopen(t, ok(kept.Abort(now)), newKEK(t, 1), &anchor)
	if r := aborted.Info().Retired; len(r) != 1 || !r[0].Unused || r[0].KeyID != staged.StagedID() || names(aborted.Slots()) != "one|one" || aborted.own.of(staged.StagedID()) != nil {
		t.Errorf("%+v, slots %q", aborted.Info(), names(aborted.Slots()))
	}
	pruned := ok(active.Prune(a.CurrentID()))
	if pruned.Holds(a.CurrentID()) || pruned.Revision() != active.Revision()+1 || !active.Holds(a.CurrentID()) {
		t.Error("prune")
	}
	for _, id := range []seal.KeyID{active.CurrentID(), a.StagedID(), "k1-x"} {
		if _, err := active.Prune(id); err == nil {
			t.Errorf("%q is pruned", id)
		}
	}
	// A node without slots of its own opens with the shared ones.
	b := ok(ok(open(staged.Shared(), newKEK(t, 1), nil)).OnNode("cp-2", nil, nil))
	if !ok(b.OpenStaged(newKEK(t, 60))).Acknowledged() {
		t.Error("a node without a TPM does not acknowledge")
	}
	if _, err := ok(open(staged.Marshal(), newKEK(t, 1), nil)).GiveUpStaged(); err == nil {
		t.Error("another node's staged KEK is dropped")
	}
}

// TestFullSection: a file over the limit is not written.
func TestFullSection(t *testing.T) {
	a, _ := cluster2(t)
	big := strings.Repeat("x", seal.MaxSlotData-64)
	var slots []seal.Slot
	for i := range MaxSlots {
		slots = append(slots, tpmSlots("cp-1", fmt.Sprint(i, big))...)
	}
	_, err := a.WithOwnSlots(slots, nil)
	if err == nil || !strings.Contains(err.Error(), "more than") {
		t.Error(err)
	}
	if _, err := a.WithOwnSlots(slots[:8], nil); err != nil {
		t.Error(err)
	}
}

// TestJoinDone: both sides compute the same value, and nobody can without the current
// KEK.
func TestJoinDone(t *testing.T) {
	a, b := cluster2(t)
	sum := a.JoinDone([]byte("transcript"))
	if len(sum) != 32 || !bytes.Equal(sum, b.JoinDone([]byte("transcript"))) {
		t.Errorf("%x", sum)
	}
	for what, other := range map[string][]byte{"another transcript": b.JoinDone([]byte("other")), "another KEK": newKeyring(t, 2).JoinDone([]byte("transcript"))} {
		if bytes.Equal(sum, other) {
			t.Errorf("the same with %s", what)
		}
	}
	if want := "d0569cd87d85f436d47ccd9ae83ba8e41101599817138131a28a706f13a0124c"; hex.EncodeToString(sum) != want {
		t.Errorf("%x, want %s", sum, want)
	}
}
