package keyring

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// forge returns a keyring of this body with a MAC that verifies under kek, as an attacker
// who knows kek would write it.
func forge(t testing.TB, body []byte, kek *seal.Secret) []byte {
	t.Helper()
	var sum []byte
	withKEK(kek, func(b []byte) { sum = bodyMAC(b, body) })
	file := must[[]byte](t)(encode(envelope{Body: body, MAC: sum}))
	return append(file, '\n')
}

// edited returns the encoded body of the golden keyring after edit.
func edited(t testing.TB, edit func(b *document)) []byte {
	t.Helper()
	u := must[*Untrusted](t)(Parse(golden(t, "keyring.json")))
	edit(u.doc)
	return must[[]byte](t)(encodeBody(u.doc))
}

func open(file []byte, kek *seal.Secret, anchor *Anchor) (*Keyring, error) {
	u, err := Parse(file)
	if err != nil {
		return nil, err
	}
	return u.Open(kek, anchor)
}

func wantRefusal(t testing.TB, err error, cause seal.Cause, says ...string) {
	t.Helper()
	e, ok := err.(*seal.Error)
	if !ok || e.Cause != cause || e.Hint == "" {
		t.Errorf("%v (cause %q), want cause %q and a hint", err, seal.CauseOf(err), cause)
		return
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q does not say %q", err, s)
		}
	}
}

func TestTruncatedKeyringIsRefused(t *testing.T) {
	file := golden(t, "keyring.json")
	for n := range file {
		if _, err := Parse(file[:n]); err == nil {
			t.Errorf("the first %d bytes are accepted", n)
		}
	}
}

func TestEveryFlippedBitIsRefused(t *testing.T) {
	file, kek := golden(t, "keyring.json"), newKEK(t, 0x81)
	for i := range len(file) * 8 {
		flipped := bytes.Clone(file)
		flipped[i/8] ^= 1 << (i % 8)
		_, err := open(flipped, kek, nil)
		if err == nil {
			t.Fatalf("bit %d of byte %d flipped: opens", i%8, i/8)
		}
		if e, ok := err.(*seal.Error); !ok || e.Hint == "" {
			t.Fatalf("bit %d of byte %d flipped: untyped error %v", i%8, i/8, err)
		}
	}
}

// TestEnvelope: an envelope with an error around the body is refused.
func TestEnvelope(t *testing.T) {
	file := string(golden(t, "keyring.json"))
	var e envelope
	if err := json.Unmarshal([]byte(file), &e); err != nil {
		t.Fatal(err)
	}
	mac := base64.StdEncoding.EncodeToString(e.MAC)
	for name, f := range map[string]string{
		"empty":              "",
		"newline":            "\n",
		"null":               "null\n",
		"array":              "[]\n",
		"two keyrings":       file + file,
		"trailing byte":      file + " ",
		"second newline":     file + "\n",
		"no newline":         strings.TrimSuffix(file, "\n"),
		"byte order mark":    "\ufeff" + file,
		"white space":        strings.Replace(file, `"mac":`, `"mac": `, 1),
		"unknown field":      strings.Replace(file, `,"mac":`, `,"x":1,"mac":`, 1),
		"long field":         strings.Replace(file, `,"mac":`, `,"`+strings.Repeat("x", 5000)+`":1,"mac":`, 1),
		"duplicate body":     strings.Replace(file, `{"body":`, `{"body":"","body":`, 1),
		"duplicate mac":      strings.Replace(file, `,"mac":`, `,"mac":"","mac":`, 1),
		"other case":         strings.Replace(file, `"mac"`, `"MAC"`, 1),
		"both cases":         strings.Replace(file, `,"mac":`, `,"MAC":"","mac":`, 1),
		"escaped name":       strings.Replace(file, `"mac"`, `"m\u0061c"`, 1),
		"other order":        `{"mac":"` + mac + `","body":"` + base64.StdEncoding.EncodeToString(e.Body) + "\"}\n",
		"no mac":             file[:strings.Index(file, `,"mac"`)] + "}\n",
		"short mac":          strings.Replace(file, mac, base64.StdEncoding.EncodeToString(e.MAC[1:]), 1),
		"unpadded base64":    strings.Replace(file, mac, strings.TrimRight(mac, "="), 1),
		"URL base64":         strings.Replace(file, mac, base64.URLEncoding.EncodeToString(bytes.Repeat([]byte{0xff}, 32)), 1),
		"loose base64":       strings.Replace(file, "F4=", "F5=", 1),
		"newline in base64":  strings.Replace(file, mac, mac[:8]+`\n`+mac[8:], 1),
		"oversize":           strings.Repeat(" ", MaxSize) + file,
		"oversize body":      `{"body":"` + strings.Repeat("A", MaxSize) + `","mac":"` + mac + "\"}\n",
		"deep":               strings.Repeat("[", MaxSize-1) + "\n",
		"not UTF-8":          strings.Replace(file, mac, "\xff", 1),
		"body of other type": `{"body":{},"mac":"` + mac + "\"}\n",
	} {
		if f == file {
			t.Errorf("%s: the test changes nothing", name)
		}
		_, err := Parse([]byte(f))
		wantRefusal(t, err, seal.CauseKeyringCorrupt, "parse keyring")
		if err != nil && len(err.Error()) > 500 {
			t.Errorf("%s: the error has %d bytes", name, len(err.Error()))
		}
	}
}

// TestBody: a body with an error is refused although its MAC verifies.
func TestBody(t *testing.T) {
	kek := newKEK(t, 0x81)
	body := string(edited(t, func(*document) {}))
	many := func(n int, s seal.Slot) (out []seal.Slot) {
		for range n {
			out = append(out, s)
		}
		return out
	}
	edit := func(f func(b *document)) string { return string(edited(t, f)) }
	slot := seal.Slot{Type: "tpm", Node: "cp-1", Data: []byte("{}")}
	for name, b := range map[string]string{
		"empty":              "",
		"null":               "null",
		"format 2":           strings.Replace(body, `"format":1`, `"format":2`, 1),
		"format 0":           strings.Replace(body, `"format":1`, `"format":0`, 1),
		"format twice":       strings.Replace(body, `"format":1`, `"format":1,"format":1`, 1),
		"format 1 then 2":    strings.Replace(body, `"format":1`, `"format":2,"Format":1`, 1),
		"format 1.0":         strings.Replace(body, `"format":1`, `"format":1.0`, 1),
		"unknown field":      strings.Replace(body, `"revision"`, `"x":1,"revision"`, 1),
		"unknown in slot":    strings.Replace(body, `"node":"cp-1"`, `"node":"cp-1","module":"/x.so"`, 1),
		"duplicate field":    strings.Replace(body, `"revision":6`, `"revision":9,"revision":6`, 1),
		"other case":         strings.Replace(body, `"revision"`, `"Revision"`, 1),
		"trailing bytes":     body + "{}",
		"white space":        body + " ",
		"revision 0":         edit(func(b *document) { b.Revision = 0 }),
		"revision 2^53":      edit(func(b *document) { b.Revision = 1 << 53 }),
		"negative revision":  strings.Replace(body, `"revision":6`, `"revision":-6`, 1),
		"upper-case cluster": strings.Replace(body, `0c0d0e0f`, `0C0D0E0F`, 1),
		"time zone":          strings.Replace(body, `12:00:00Z`, `12:00:00+00:00`, 1),
		"fraction":           strings.Replace(body, `12:00:00Z`, `12:00:00.0Z`, 1),
		"no slots":           edit(func(b *document) { b.Current.Slots = nil }),
		"17 slots":           edit(func(b *document) { b.Current.Slots = many(MaxSlots+1, slot) }),
		"17 staged slots":    edit(func(b *document) { b.Staged.Slots = many(MaxSlots+1, slot) }),
		"unknown node":       edit(func(b *document) { b.Current.Slots[0].Node = "cp-3" }),
		"big slot": edit(func(b *document) {
			b.Current.Slots[0].Data = []byte(`{"a":"` + strings.Repeat("a", seal.MaxSlotData) + `"}`)
		}),
		"slot no object":      edit(func(b *document) { b.Current.Slots[0].Data = []byte(`"x"`) }),
		"slot type":           edit(func(b *document) { b.Current.Slots[0].Type = "../x" }),
		"key ID":              edit(func(b *document) { b.Current.KeyID = b.Current.KeyID[:54] }),
		"key ID prefix":       edit(func(b *document) { b.Current.KeyID = "k2-" + b.Current.KeyID[3:] }),
		"key ID loose base32": edit(func(b *document) { b.Current.KeyID = b.Current.KeyID[:54] + "r" }),
		"staged is current":   edit(func(b *document) { b.Staged.KeyID = b.Current.KeyID }),
		"retired is current":  edit(func(b *document) { b.Retired[0].KeyID = b.Current.KeyID }),
		"retired is staged":   edit(func(b *document) { b.Retired[0].KeyID = b.Staged.KeyID }),
		"retired twice":       edit(func(b *document) { b.Retired[1].KeyID = b.Retired[0].KeyID }),
		"257 retired":         edit(func(b *document) { b.Retired = manyRetired(MaxRetired + 1) }),
		"retired short":       edit(func(b *document) { b.Retired[0].Sealed = b.Retired[0].Sealed[1:] }),
		"65 nodes":            edit(func(b *document) { b.Nodes = manyNodes(MaxNodes + 1) }),
		"node name":           edit(func(b *document) { b.Nodes[1].Name = "a/b" }),
		"node twice":          edit(func(b *document) { b.Nodes[1].Name = "cp-1" }),
		"EK twice":            edit(func(b *document) { b.Nodes[1].EK = b.Nodes[0].EK }),
		"EK":                  edit(func(b *document) { b.Nodes[1].EK = "sha1:00" }),
		"not UTF-8":           strings.Replace(body, "third", "\xff", 1),
	} {
		if b == body {
			t.Errorf("%s: the test changes nothing", name)
		}
		if _, err := Parse(forge(t, []byte(b), kek)); seal.CauseOf(err) != seal.CauseKeyringCorrupt {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := Parse(forge(t, []byte(strings.Replace(body, `"format":1`, `"format":7`, 1)), kek))
	wantRefusal(t, err, seal.CauseKeyringCorrupt, "unknown format 7", "install")
	if _, err := open(forge(t, []byte(body), kek), kek, nil); err != nil {
		t.Errorf("the body that these were made from: %v", err)
	}
}

func manyNodes(n int) (out []Node) {
	out = []Node{{Name: "cp-1"}}
	for i := range n - 1 {
		out = append(out, Node{Name: fmt.Sprintf("more-%d", i)})
	}
	return out
}

func manyRetired(n int) (out []retired) {
	for i := range n {
		id := keyID(cluster, fmt.Appendf(nil, "%032d", i))
		out = append(out, retired{KeyID: id, Created: newStamp(now), Retired: newStamp(now), Sealed: make([]byte, 60)})
	}
	return out
}

// TestLimitsAreInclusive: a keyring at its limits parses.
func TestLimitsAreInclusive(t *testing.T) {
	body := edited(t, func(b *document) {
		b.Nodes, b.Retired, b.Revision = manyNodes(MaxNodes), manyRetired(MaxRetired), MaxRevision
		for len(b.Current.Slots) <= MaxSlots { // one of the first slots is for no particular node
			b.Current.Slots = append(b.Current.Slots, b.Current.Slots[0])
		}
	})
	if _, err := Parse(forge(t, body, newKEK(t, 0x81))); err != nil {
		t.Error(err)
	}
}

// TestRefusalNamesTheField: an operator who edited the file learns which field is wrong.
func TestRefusalNamesTheField(t *testing.T) {
	file := strings.Replace(string(golden(t, "keyring.json")), `,"mac":`, `,"extra":1,"mac":`, 1)
	_, err := Parse([]byte(file))
	wantRefusal(t, err, seal.CauseKeyringCorrupt, "unknown field", "extra")
}

// TestRefusalsOfParseNameTheRemedy: the remedy for a damaged keyring is a restore, and
// the remedy for a later format is a later kleidi.
func TestRefusalsOfParseNameTheRemedy(t *testing.T) {
	newer := bytes.Replace(edited(t, func(*document) {}), []byte(`{"format":1,`), []byte(`{"format":9,`), 1)
	_, err := Parse(forge(t, newer, newKEK(t, 0x81)))
	wantRefusal(t, err, seal.CauseKeyringCorrupt, "unknown format 9", "install the version of kleidi that wrote it")
	_, err = Parse([]byte("{}\n"))
	wantRefusal(t, err, seal.CauseKeyringCorrupt, hintRestore)
}

// TestSwaps: parts of one keyring are refused in another.
func TestSwaps(t *testing.T) {
	kek := newKEK(t, 0x81)
	u := must[*Untrusted](t)(Parse(golden(t, "keyring.json")))
	withOldMAC := func(body []byte) []byte { // the MAC of the golden keyring
		return append(must[[]byte](t)(encode(envelope{Body: body, MAC: u.mac})), '\n')
	}
	_, err := open(withOldMAC(edited(t, func(b *document) { b.Current.Slots = b.Staged.Slots })), kek, nil)
	wantRefusal(t, err, seal.CauseKeyringCorrupt, "MAC")
	_, err = open(withOldMAC(edited(t, func(b *document) { b.Current.Slots[0].Node = "cp-2" })), kek, nil)
	wantRefusal(t, err, seal.CauseKeyringCorrupt, "MAC")
	_, err = open(withOldMAC(edited(t, func(b *document) { b.ClusterID[0] ^= 1 })), kek, nil)
	wantRefusal(t, err, seal.CauseSlotCorrupt, "cluster 01010203")
	// The slot opens, but holds the KEK of another keyring, or the staged or a retired
	// one.
	for _, first := range []byte{0x01, 0x41, 0xc1, 0x05} {
		_, err = open(golden(t, "keyring.json"), newKEK(t, first), nil)
		wantRefusal(t, err, seal.CauseSlotCorrupt, string(u.CurrentID()))
	}
	// The MAC verifies, but two retired KEKs have changed places.
	_, err = open(forge(t, edited(t, func(b *document) {
		b.Retired[0].Sealed, b.Retired[1].Sealed = b.Retired[1].Sealed, b.Retired[0].Sealed
	}), kek), kek, nil)
	wantRefusal(t, err, seal.CauseKeyringCorrupt, "retired")
}

// TestAttackersKEK: anyone can seal a KEK of their own to this TPM and write a
// consistent keyring around it. The anchor refuses that keyring.
func TestAttackersKEK(t *testing.T) {
	mine := rotate(t, newKeyring(t, 1), 50)
	anchor := mine.Anchor()
	theirs := newKeyring(t, 200)
	for range 5 {
		theirs = must[*Keyring](t)(theirs.AtLeast(100))
	}
	kek := newKEK(t, 200)
	_, err := open(theirs.Marshal(), kek, &anchor)
	wantRefusal(t, err, seal.CauseAnchor, string(anchor.KeyID), string(theirs.CurrentID()),
		fmt.Sprintf("revision %d", anchor.Revision), "revision 104", "kleidi recover", "kleidi keyring restore")
	if _, err := open(theirs.Marshal(), newKEK(t, 200), nil); err != nil {
		t.Errorf("without an anchor the same keyring does not open: %v", err)
	}

	// The attacker can list the anchored key ID, but does not know its KEK.
	doc := *theirs.doc
	doc.Retired = []retired{{KeyID: anchor.KeyID, Created: newStamp(now), Retired: newStamp(now), Sealed: make([]byte, 60)}}
	_, err = open(forge(t, must[[]byte](t)(encodeBody(&doc)), kek), kek, &anchor)
	wantRefusal(t, err, seal.CauseKeyringCorrupt, "retired", string(anchor.KeyID))
	kek.With(func(b []byte) { // the attacker's own KEK under the anchored key ID
		doc.Retired[0].Sealed = aead(b, labelRetired).Seal(nil, nil, bytes.Repeat([]byte{7}, 32), retiredAAD(cluster, anchor.KeyID, theirs.CurrentID()))
	})
	_, err = open(forge(t, must[[]byte](t)(encodeBody(&doc)), kek), kek, &anchor)
	wantRefusal(t, err, seal.CauseKeyringCorrupt, "retired", string(anchor.KeyID))
}

func TestAnchor(t *testing.T) {
	first := newKeyring(t, 1)
	third := rotate(t, rotate(t, first, 50), 100)
	file := third.Marshal()
	at := func(k *Keyring, revision uint64) *Anchor { p := k.Anchor(); p.Revision = revision; return &p }
	for _, ok := range []*Anchor{nil, at(third, 5), at(third, 1), at(first, 1), at(first, 5)} {
		if _, err := open(file, newKEK(t, 100), ok); err != nil {
			t.Errorf("anchor %+v: %v", ok, err)
		}
	}
	_, err := open(file, newKEK(t, 100), at(third, 6))
	wantRefusal(t, err, seal.CauseAnchor, "revision 5", "revision 6", string(third.CurrentID()), "kleidi recover")
	_, err = open(first.Marshal(), newKEK(t, 1), at(first, 2))
	wantRefusal(t, err, seal.CauseAnchor, "revision 1", "revision 2")
	_, err = open(first.Marshal(), newKEK(t, 1), at(third, 1))
	wantRefusal(t, err, seal.CauseAnchor, string(third.CurrentID()), string(first.CurrentID()))
	foreign := third.Anchor()
	foreign.ClusterID[0] ^= 1
	_, err = open(file, newKEK(t, 100), &foreign)
	wantRefusal(t, err, seal.CauseAnchor, foreign.ClusterID.String(), cluster.String())
	staged := must[*Keyring](t)(first.Stage(newKEK(t, 60), slots("next"), now))
	p := Anchor{ClusterID: cluster, KeyID: staged.Info().Staged.KeyID, Revision: 1}
	_, err = open(staged.Marshal(), newKEK(t, 1), &p)
	wantRefusal(t, err, seal.CauseAnchor) // nobody anchors a staged KEK
}

func TestParseAnchor(t *testing.T) {
	file := string(golden(t, "anchor.json"))
	for name, f := range map[string]string{
		"empty": "", "null": "null\n", "two": file + file, "no newline": strings.TrimSpace(file),
		"unknown":    strings.Replace(file, `"revision"`, `"x":1,"revision"`, 1),
		"duplicate":  strings.Replace(file, `"revision":6`, `"revision":1,"revision":6`, 1),
		"other case": strings.Replace(file, `"revision"`, `"Revision"`, 1),
		"format":     strings.Replace(file, `"format":1`, `"format":2`, 1),
		"revision":   strings.Replace(file, `:6}`, `:0}`, 1),
		"key ID":     strings.Replace(file, `"k1-i`, `"k1-I`, 1),
		"oversize":   strings.Repeat(" ", MaxAnchorSize) + file,
	} {
		if f == file {
			t.Errorf("%s: the test changes nothing", name)
		}
		if _, err := ParseAnchor([]byte(f)); seal.CauseOf(err) != seal.CauseAnchor {
			t.Errorf("%s: %v", name, err)
		}
	}
	j, err := json.Marshal(map[string]Anchor{"anchor": must[Anchor](t)(ParseAnchor([]byte(file)))})
	if err != nil || string(j) != `{"anchor":`+strings.TrimSpace(file)+`}` {
		t.Errorf("%s, %v", j, err)
	}
}

// TestLimitsHoldForWriting: kleidi writes no keyring that it would refuse to read.
func TestLimitsHoldForWriting(t *testing.T) {
	k := newKeyring(t, 1)
	big := []byte(`{"a":"` + strings.Repeat("a", 30<<10) + `"}`)
	var many []seal.Slot
	for i := range 40 {
		many = append(many, seal.Slot{Type: "tpm", Node: []string{"", "cp-1", "cp-2"}[i%3], Data: big})
	}
	nodes := []Node{{Name: "cp-1"}, {Name: "cp-2"}}
	if _, err := k.WithNodes(nodes, many); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a keyring of more than MaxSize bytes: %v", err)
	}
	if _, err := k.WithNodes(nodes, many[:20]); err != nil {
		t.Errorf("600 KiB of slots: %v", err)
	}
	for _, bad := range []string{`{`, `{"a":1}{}`, ``, `"s"`} {
		if _, err := k.WithSlots([]seal.Slot{{Type: "tpm", Data: []byte(bad)}}); err == nil {
			t.Errorf("slot data %q is written", bad)
		}
	}
	if _, err := k.AtLeast(MaxRevision + 1); err == nil {
		t.Error("a revision over the limit is written")
	}
	if _, err := k.Stage(newKEK(t, 1), slots("same"), now); err == nil {
		t.Error("the current KEK is staged")
	}
	old := rotate(t, k, 50)
	if _, err := old.Stage(newKEK(t, 1), slots("again"), now); err == nil {
		t.Error("a retired KEK is staged")
	}
}
