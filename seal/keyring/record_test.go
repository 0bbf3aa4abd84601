package keyring

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// recordOf returns the record of a node that is in step and trusts k.
func recordOf(k *Keyring) Record {
	self, _ := k.Self()
	return Record{Node: self.Name, Formats: Formats(), Version: "v1", Revision: k.Revision(), Anchored: k.CurrentID(), Announced: k.CurrentID(), Started: now,
		BootStates: []RecordedState{{Bank: "sha256", PCRs: map[string]string{"7": strings.Repeat("07", 32)}, AtMost: 3}}}
}

func signed(t testing.TB, k *Keyring, r Record) *UntrustedRecord {
	t.Helper()
	return must[*UntrustedRecord](t)(ParseRecord(must[[]byte](t)(k.SignRecord(r))))
}

// TestRecords: each node reads the other's record, before a rotation and in each of its
// phases.
func TestRecords(t *testing.T) {
	ok := must[*Keyring](t)
	a, b := cluster2(t)
	r := recordOf(b)
	r.Problem, r.Encrypted = "nothing — or nearly", b.CurrentID()
	v := must[*VerifiedRecord](t)(signed(t, b, r).Verify(a))
	if got, want := fmt.Sprint(v.Record), fmt.Sprint(r); got != want || v.KeyID != a.CurrentID() || v.Proven {
		t.Errorf("%s, want %s", got, want)
	}
	staged := acknowledge(t, ok(a.Stage(newKEK(t, 60), imports(), now)), 60)
	bStaged := acknowledge(t, ok(b.Follow(published(t, staged), nil)), 60)
	r = recordOf(bStaged)
	r.Acknowledged = staged.StagedID()
	if v := must[*VerifiedRecord](t)(signed(t, bStaged, r).Verify(staged)); !v.Proven || v.Acknowledged != staged.StagedID() {
		t.Errorf("%+v", v)
	}
	active := ok(staged.Activate(now))
	// A node that has not followed yet: its MAC is under a KEK that has retired.
	v = must[*VerifiedRecord](t)(signed(t, bStaged, r).Verify(active))
	if v.KeyID == active.CurrentID() || !v.Proven {
		t.Errorf("%+v", v)
	}
	// A node that is ahead of a restored store: its MAC is under the staged KEK.
	ahead := ok(bStaged.Follow(published(t, active), nil))
	r = recordOf(ahead)
	r.Acknowledged = staged.StagedID()
	if v := must[*VerifiedRecord](t)(signed(t, ahead, r).Verify(staged)); !v.Proven || v.KeyID != staged.StagedID() {
		t.Errorf("%+v", v)
	}
	// If the staged KEK is not open, the proof is neither accepted nor refuted.
	closed := reopen(t, staged, newKEK(t, 1), nil)
	r = recordOf(bStaged)
	r.Acknowledged = staged.StagedID()
	if v := must[*VerifiedRecord](t)(signed(t, bStaged, r).Verify(closed)); v.Proven {
		t.Error("it is proven by nothing")
	}
	if _, err := closed.SignRecord(r); err == nil || !strings.Contains(err.Error(), "not open") {
		t.Errorf("a node acknowledges what it does not hold: %v", err)
	}
}

// TestForgedRecords: neither an attacker without a KEK nor one with an old KEK can make
// a record that counts.
func TestForgedRecords(t *testing.T) {
	ok := must[*Keyring](t)
	a, b := cluster2(t)
	staged := acknowledge(t, ok(a.Stage(newKEK(t, 60), imports(), now)), 60)
	bStaged := acknowledge(t, ok(b.Follow(published(t, staged), nil)), 60)
	r := recordOf(bStaged)
	r.Acknowledged = staged.StagedID()
	genuine := signed(t, bStaged, r)

	// The intruder knows the current KEK, not the staged one.
	resign := func(kek byte, change func(*record1)) []byte {
		doc := *genuine.doc
		change(&doc)
		e := recordEnvelope{Record: must[[]byte](t)(encode(&doc))}
		withKEK(newKEK(t, kek), func(b []byte) { e.MAC = recordMAC(b, e.Record) })
		return append(must[[]byte](t)(encode(e)), '\n')
	}
	if _, err := must[*UntrustedRecord](t)(ParseRecord(resign(1, func(*record1) {}))).Verify(staged); err != nil {
		t.Fatalf("the record that these are made from: %v", err)
	}
	active := ok(staged.Activate(now))
	gone := ok(staged.WithoutNode("cp-2"))
	for name, c := range map[string]struct {
		b    []byte
		k    *Keyring
		says string
	}{
		"no KEK":                      {resign(5, func(*record1) {}), staged, "MAC"},
		"the MAC under another KEK":   {resign(60, func(*record1) {}), staged, "MAC"},
		"a KEK that nobody holds":     {resign(5, func(r *record1) { r.KeyID = NewKeyID(cluster, newKEK(t, 5)) }), staged, "MAC"},
		"another cluster":             {resign(1, func(r *record1) { r.ClusterID[0] ^= 1 }), staged, "of cluster"},
		"an unknown node":             {resign(1, func(r *record1) { r.Node = "cp-9" }), staged, "not in the keyring"},
		"a removed node":              {resign(1, func(*record1) {}), gone, "not in the keyring"},
		"another node's proof":        {resign(1, func(r *record1) { r.Node = "cp-1" }), staged, "does not prove"},
		"a proof by the current KEK":  {resign(1, func(r *record1) { r.Proof = proofBy(t, 1, r) }), staged, "does not prove"},
		"the proof of another KEK":    {resign(1, func(r *record1) { r.Acknowledged = a.CurrentID() }), staged, "does not prove"},
		"a proof for another cluster": {resign(1, func(r *record1) { r.Proof[0] ^= 1 }), staged, "does not prove"},
		"the same, once it retired":   {resign(1, func(r *record1) { r.Proof = proofBy(t, 1, r) }), active, "does not prove"},
	} {
		u, err := ParseRecord(c.b)
		if err == nil {
			_, err = u.Verify(c.k)
		}
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func proofBy(t testing.TB, first byte, r *record1) (sum []byte) {
	withKEK(newKEK(t, first), func(b []byte) { sum = acknowledgement(b, r.ClusterID, r.Node, r.Acknowledged) })
	return sum
}

// TestRecordParsing tests records whose MAC verifies.
func TestRecordParsing(t *testing.T) {
	kek := newKEK(t, 0x81)
	u := must[*UntrustedRecord](t)(ParseRecord(golden2(t, "record.json")))
	record := string(u.raw)
	edit := func(f func(r *record1)) string {
		var r record1
		if err := json.Unmarshal(u.raw, &r); err != nil {
			t.Fatal(err)
		}
		f(&r)
		return string(must[[]byte](t)(encode(&r)))
	}
	replace := func(old, with string) string { return strings.Replace(record, old, with, 1) }
	states := func(n int) (out []RecordedState) {
		for range n {
			out = append(out, u.doc.BootStates[0])
		}
		return out
	}
	pcrs := func(f func(m map[string]string)) string {
		return edit(func(r *record1) { f(r.BootStates[0].PCRs) })
	}
	ones := strings.Repeat("11", 32)
	for name, b := range map[string]string{
		"empty":               "",
		"null":                "null",
		"format":              replace(`"format":1`, `"format":2`),
		"unknown field":       replace(`"revision"`, `"x":1,"revision"`),
		"white space":         record + " ",
		"unknown in state":    replace(`"atMost":3`, `"atMost":3,"x":1`),
		"node name":           edit(func(r *record1) { r.Node = "a/b" }),
		"key ID":              edit(func(r *record1) { r.KeyID = "" }),
		"anchored":            edit(func(r *record1) { r.Anchored = "k1-" }),
		"announced":           edit(func(r *record1) { r.Announced = "" }),
		"encrypted":           edit(func(r *record1) { r.Encrypted = "x" }),
		"acknowledged":        edit(func(r *record1) { r.Acknowledged = "x" }),
		"no proof":            edit(func(r *record1) { r.Proof = nil }),
		"nothing proven":      edit(func(r *record1) { r.Acknowledged = "" }),
		"short proof":         edit(func(r *record1) { r.Proof = r.Proof[1:] }),
		"revision 0":          edit(func(r *record1) { r.Revision = 0 }),
		"revision 2^53":       edit(func(r *record1) { r.Revision = 1 << 53 }),
		"no formats":          edit(func(r *record1) { r.Formats = nil }),
		"formats descending":  edit(func(r *record1) { r.Formats = []int{2, 1} }),
		"a format twice":      edit(func(r *record1) { r.Formats = []int{1, 1} }),
		"format 0":            edit(func(r *record1) { r.Formats = []int{0} }),
		"many formats":        edit(func(r *record1) { r.Formats = ascending(maxFormats + 1) }),
		"long version":        edit(func(r *record1) { r.Version = strings.Repeat("v", MaxText+1) }),
		"version in lines":    edit(func(r *record1) { r.Version = "a\nb" }),
		"terminal in problem": edit(func(r *record1) { r.Problem = "\x1b[2J" }),
		"17 boot states":      edit(func(r *record1) { r.BootStates = states(MaxSlots + 1) }),
		"bank":                edit(func(r *record1) { r.BootStates[0].Bank = "sha1" }),
		"value of other bank": edit(func(r *record1) { r.BootStates[0].Bank = "sha384" }),
		"no PCRs":             edit(func(r *record1) { r.BootStates[0].PCRs = nil }),
		"PCR 24":              pcrs(func(m map[string]string) { m["24"] = ones }),
		"PCR -1":              pcrs(func(m map[string]string) { m["-1"] = ones }),
		"PCR 07":              pcrs(func(m map[string]string) { m["07"] = ones }),
		"PCR x":               pcrs(func(m map[string]string) { m["x"] = ones }),
		"value in upper case": pcrs(func(m map[string]string) { m["7"] = strings.Repeat("AA", 32) }),
		"short value":         pcrs(func(m map[string]string) { m["7"] = ones[2:] }),
		"use":                 edit(func(r *record1) { r.BootStates[0].Use = "Next!" }),
		"signer without key":  edit(func(r *record1) { r.BootStates[1].Signer.Key = nil }),
		"long key":            edit(func(r *record1) { r.BootStates[1].Verifier.Key = make([]byte, MaxKeyArea+1) }),
		"long ref":            edit(func(r *record1) { r.BootStates[1].Signer.Ref = make([]byte, MaxRef+1) }),
		"started":             replace(`11:00:00Z"`, `11:00:00.5Z"`),
	} {
		if b == record {
			t.Errorf("%s: the test changes nothing", name)
		}
		e := recordEnvelope{Record: []byte(b)}
		withKEK(kek, func(k []byte) { e.MAC = recordMAC(k, e.Record) })
		if _, err := ParseRecord(append(must[[]byte](t)(encode(e)), '\n')); err == nil || !strings.HasPrefix(err.Error(), "parse record: ") || len(err.Error()) > 400 {
			t.Errorf("%s: %v", name, err)
		}
	}
	file := string(golden2(t, "record.json"))
	for name, f := range map[string]string{
		"no newline": strings.TrimSuffix(file, "\n"), "two": file + file, "oversize": strings.Repeat(" ", MaxRecordSize) + file,
		"a field more": strings.Replace(file, `,"mac"`, `,"x":1,"mac"`, 1), "no MAC": file[:strings.Index(file, `,"mac"`)] + "}\n",
		"a keyring": string(golden2(t, "shared.json")), "null": "null\n",
	} {
		if _, err := ParseRecord([]byte(f)); err == nil {
			t.Errorf("%s is a record", name)
		}
	}
}

func ascending(n int) (out []int) {
	for i := range n {
		out = append(out, i+1)
	}
	return out
}

// TestRecordsAreNotWritten: SignRecord refuses a record that nobody could read.
func TestRecordsAreNotWritten(t *testing.T) {
	a, _ := cluster2(t)
	for name, change := range map[string]func(*Record){
		"no node":   func(r *Record) { r.Node = "" },
		"a problem": func(r *Record) { r.Problem = strings.Repeat("x", MaxText+1) },
		"too large": func(r *Record) {
			for range MaxSlots - 1 {
				s := RecordedState{Bank: "sha384", PCRs: map[string]string{}, Signer: &RecordedKey{Key: make([]byte, MaxKeyArea), Ref: make([]byte, MaxRef)}}
				s.Verifier = s.Signer
				for i := range MaxPCRs {
					s.PCRs[fmt.Sprint(i)] = strings.Repeat("00", 48)
				}
				r.BootStates = append(r.BootStates, s)
			}
		},
	} {
		r := recordOf(a)
		change(&r)
		if b, err := a.SignRecord(r); err == nil || b != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzParseRecord: a parsed record is written back byte by byte, and only a holder of
// the KEK can change it.
func FuzzParseRecord(f *testing.F) {
	file := golden2(f, "record.json")
	k := golden2Keyring(f)
	f.Add(file)
	f.Add(bytes.Replace(file, []byte("A"), []byte("B"), 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		u, err := ParseRecord(b)
		if err != nil {
			return
		}
		again, err := encode(recordEnvelope{Record: u.raw, MAC: u.mac})
		if err != nil || !bytes.Equal(append(again, '\n'), b) {
			t.Errorf("%q is accepted, but written as %q", b, again)
		}
		if _, err := u.Verify(k); err == nil && !bytes.Equal(b, file) {
			t.Errorf("verifies: %q", b)
		}
	})
}

// FuzzRecord is FuzzParseRecord without the base64.
func FuzzRecord(f *testing.F) {
	u := must[*UntrustedRecord](f)(ParseRecord(golden2(f, "record.json")))
	f.Add(u.raw)
	f.Add([]byte(`{"format":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := new(record1)
		if decode(b, r) != nil || r.check() != nil {
			return
		}
		if again, err := encode(r); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%q is accepted, but written as %q", b, again)
		}
		for _, s := range r.BootStates {
			if len(s.PCRs) > MaxPCRs || seal.OneLine(s.Bank, 10) != s.Bank {
				t.Errorf("%+v", s)
			}
		}
	})
}

// FuzzSection: a section that parses is written back byte by byte.
func FuzzSection(f *testing.F) {
	u := must[*Untrusted](f)(Parse(golden2(f, "keyring.json")))
	f.Add(u.section)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseSection2(b)
		if err != nil {
			return
		}
		if again, err := encode(s); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%q is accepted, but written as %q", b, again)
		}
		if s.checkBeside(u.doc) == nil && (s.ClusterID != u.doc.ClusterID || s.KeyID != u.doc.Current.KeyID) {
			t.Errorf("%q stands beside another keyring", b)
		}
	})
}

// FuzzBody2 is FuzzParse for the body of format 2.
func FuzzBody2(f *testing.F) {
	f.Add(must[*Untrusted](f)(Parse(golden2(f, "shared.json"))).body)
	f.Add([]byte(`{"format":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		body, err := parseBody2(b)
		if err != nil {
			return
		}
		if again, err := encodeBody(body.document()); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%q is accepted, but written as %q", b, again)
		}
	})
}
