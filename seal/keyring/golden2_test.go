package keyring

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// Another implementation, written from docs/keyring-format.md, made the files in
// testdata/format2. They must open for ever.

func golden2(t testing.TB, name string) []byte {
	t.Helper()
	return must[[]byte](t)(os.ReadFile(filepath.Join("..", "..", "testdata", "format2", name)))
}

type vectors2 struct {
	ClusterID                                 seal.ClusterID
	KEK, StagedKEK, UnusedKEK                 string
	KeyID, StagedKeyID, UnusedKeyID           seal.KeyID
	SectionKey, RecordKey, AcknowledgementKey string
	SectionMAC, RecordMAC                     string
	AcknowledgementMessage, Acknowledgement   string
}

func TestVectors2(t *testing.T) {
	var v vectors2
	if err := json.Unmarshal(golden2(t, "vectors.json"), &v); err != nil {
		t.Fatal(err)
	}
	kek, staged := unhex(t, v.KEK), unhex(t, v.StagedKEK)
	key := func(kek []byte, label string) (s string) {
		derive(kek, label, func(key []byte) { s = hex.EncodeToString(key) })
		return s
	}
	u := must[*Untrusted](t)(Parse(golden2(t, "keyring.json")))
	r := must[*UntrustedRecord](t)(ParseRecord(golden2(t, "record.json")))
	for what, is := range map[string][2]string{
		"key ID":                  {string(keyID(v.ClusterID, kek)), string(v.KeyID)},
		"staged key ID":           {string(keyID(v.ClusterID, staged)), string(v.StagedKeyID)},
		"unused key ID":           {string(keyID(v.ClusterID, unhex(t, v.UnusedKEK))), string(v.UnusedKeyID)},
		"section key":             {key(kek, labelSection), v.SectionKey},
		"record key":              {key(kek, labelRecord), v.RecordKey},
		"acknowledgement key":     {key(staged, labelAcknowledged), v.AcknowledgementKey},
		"section MAC":             {hex.EncodeToString(sectionMAC(kek, u.section)), v.SectionMAC},
		"record MAC":              {hex.EncodeToString(recordMAC(kek, r.raw)), v.RecordMAC},
		"acknowledgement message": {hex.EncodeToString(frame(string(v.ClusterID[:]), "cp-2", string(v.StagedKeyID))), v.AcknowledgementMessage},
		"acknowledgement":         {hex.EncodeToString(acknowledgement(staged, v.ClusterID, "cp-2", v.StagedKeyID)), v.Acknowledgement},
	} {
		if is[0] != is[1] {
			t.Errorf("%s: %s, want %s", what, is[0], is[1])
		}
	}
}

// golden2Keyring is the golden keyring of node cp-1, with the staged KEK open.
func golden2Keyring(t testing.TB) *Keyring {
	t.Helper()
	anchor := must[Anchor](t)(ParseAnchor(golden(t, "anchor.json")))
	u := must[*Untrusted](t)(Parse(golden2(t, "keyring.json")))
	k := must[*Keyring](t)(u.Open(newKEK(t, 0x81), &anchor))
	return must[*Keyring](t)(k.OpenStaged(newKEK(t, 0xc1)))
}

func TestGoldenKeyring2Opens(t *testing.T) {
	k := golden2Keyring(t)
	if !bytes.Equal(k.Marshal(), golden2(t, "keyring.json")) || !bytes.Equal(k.Shared(), golden2(t, "shared.json")) {
		t.Error("the golden files are not written as they were")
	}
	i := k.Info()
	if i.Revision != 9 || i.Commit != CommitCluster || i.Seat != "" || k.Format() != 2 || len(i.Nodes) != 3 || len(i.Retired) != 2 || i.Retired[0].Unused || !i.Retired[1].Unused {
		t.Errorf("%+v", i)
	}
	if self, ok := k.Self(); !ok || self.Name != "cp-1" || self.EpochIndex != 0x01804b01 || len(self.SRK) != 90 || self.Added.IsZero() {
		t.Errorf("%+v", self)
	}
	for what, is := range map[string][2]string{
		"current":     {names(k.Slots()), "current, present boot|current, next boot|current, recovery|current, vault"},
		"staged":      {names(k.StagedSlots()), "staged, present boot|staged, recovery|staged, import|staged, import"},
		"own current": {names(k.OwnSlots()), "current, present boot|current, next boot"},
		"own staged":  {names(k.OwnStagedSlots()), "staged, present boot"},
	} {
		if is[0] != is[1] {
			t.Errorf("%s slots: %q, want %q", what, is[0], is[1])
		}
	}
	shared := must[*Keyring](t)(open(golden2(t, "shared.json"), newKEK(t, 0x81), nil))
	if _, ok := shared.Self(); ok || len(shared.OwnSlots()) != 0 || names(shared.Slots()) != "current, recovery|current, vault" {
		t.Error("what the cluster store holds has an own section")
	}
	for _, id := range []seal.KeyID{i.Current.KeyID, i.Staged.KeyID, i.Retired[0].KeyID, i.Retired[1].KeyID} {
		if !k.Holds(id) {
			t.Errorf("%s is not held", id)
		}
	}
}

// names lists the names in the test's slots.
func names(slots []seal.Slot) (s string) {
	for i, slot := range slots {
		var d struct{ Name string }
		_ = json.Unmarshal(slot.Data, &d)
		if i > 0 {
			s += "|"
		}
		s += d.Name
	}
	return s
}

func TestGoldenRecordVerifies(t *testing.T) {
	k := golden2Keyring(t)
	v := must[*VerifiedRecord](t)(must[*UntrustedRecord](t)(ParseRecord(golden2(t, "record.json"))).Verify(k))
	if v.Node != "cp-2" || v.KeyID != k.CurrentID() || !v.Proven || v.Acknowledged != k.StagedID() || v.Revision != 9 || len(v.BootStates) != 3 || v.BootStates[2].Resets != 17 {
		t.Errorf("%+v", v)
	}
	again := must[[]byte](t)(k.SignRecord(v.Record))
	if !bytes.Equal(again, golden2(t, "record.json")) {
		t.Errorf("it is written as %s", again)
	}
}

// TestEveryFlippedBitOfFormat2IsRefused flips bits of a node's file and of a record.
func TestEveryFlippedBitOfFormat2IsRefused(t *testing.T) {
	kek, k := newKEK(t, 0x81), golden2Keyring(t)
	for name, accepts := range map[string]func([]byte) error{
		"keyring.json": func(b []byte) error { return errOf(open(b, kek, nil)) },
		"record.json": func(b []byte) error {
			u, err := ParseRecord(b)
			if err == nil {
				_, err = u.Verify(k)
			}
			return err
		},
	} {
		file := golden2(t, name)
		for i := range len(file) * 8 {
			flipped := bytes.Clone(file)
			flipped[i/8] ^= 1 << (i % 8)
			if accepts(flipped) == nil {
				t.Fatalf("%s: bit %d of byte %d flipped: accepted", name, i%8, i/8)
			}
		}
		for n := range file {
			if accepts(file[:n]) == nil {
				t.Errorf("%s: the first %d bytes are accepted", name, n)
			}
		}
	}
}
