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

// The files in testdata/format1 are never written again. Another implementation checked
// them, and they must open for ever. Their KEKs are the bytes 0x01… and 0x41… (retired),
// 0x81… (current) and 0xc1… (staged).

func golden(t testing.TB, name string) []byte {
	t.Helper()
	return must[[]byte](t)(os.ReadFile(filepath.Join("..", "..", "testdata", "format1", name)))
}

type vectors struct {
	ClusterID                                         seal.ClusterID
	KeyID, RetiredKeyID                               seal.KeyID
	KEK, KeyIDMessage, DEKSeedKey, RetiredKey, MACKey string
	MACOf, MAC                                        string
	SeedPlaintext, SeedCiphertext, SeedAAD            string
	RetiredKEK, RetiredSealed, RetiredAAD             string
	RetiredSeedPlaintext, RetiredSeedCiphertext       string
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	return must[[]byte](t)(hex.DecodeString(s))
}

func goldenVectors(t testing.TB) (v vectors) {
	t.Helper()
	if err := json.Unmarshal(golden(t, "vectors.json"), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestVectors(t *testing.T) {
	v := goldenVectors(t)
	kek := unhex(t, v.KEK)
	if got := NewKeyID(v.ClusterID, newKEK(t, 0x81)); got != v.KeyID {
		t.Errorf("key ID %s, want %s", got, v.KeyID)
	}
	derived := map[string]string{}
	for _, label := range []string{labelDEKSeed, labelRetired, labelMAC} {
		derive(kek, label, func(key []byte) { derived[label] = hex.EncodeToString(key) })
	}
	for what, is := range map[string][2]string{
		"key ID message":        {hex.EncodeToString(frame(labelKeyID, string(v.ClusterID[:]))), v.KeyIDMessage},
		"DEK seed key":          {derived[labelDEKSeed], v.DEKSeedKey},
		"retired key":           {derived[labelRetired], v.RetiredKey},
		"MAC key":               {derived[labelMAC], v.MACKey},
		"MAC":                   {hex.EncodeToString(bodyMAC(kek, []byte(v.MACOf))), v.MAC},
		"DEK seed's associated": {hex.EncodeToString(newSeedCipher(v.ClusterID, v.KeyID, kek).aad), v.SeedAAD},
		"retired associated":    {hex.EncodeToString(retiredAAD(v.ClusterID, v.RetiredKeyID, v.KeyID)), v.RetiredAAD},
	} {
		if is[0] != is[1] {
			t.Errorf("%s: %s, want %s", what, is[0], is[1])
		}
	}
	old, err := aead(kek, labelRetired).Open(nil, nil, unhex(t, v.RetiredSealed), unhex(t, v.RetiredAAD))
	if err != nil || hex.EncodeToString(old) != v.RetiredKEK {
		t.Errorf("retired KEK: %v", err)
	}
}

func TestGoldenKeyringOpens(t *testing.T) {
	v := goldenVectors(t)
	anchor := must[Anchor](t)(ParseAnchor(golden(t, "anchor.json")))
	file := golden(t, "keyring.json")
	u := must[*Untrusted](t)(Parse(file))
	k := must[*Keyring](t)(u.Open(newKEK(t, 0x81), &anchor))
	for id, seed := range map[seal.KeyID][2]string{
		v.KeyID:        {v.SeedCiphertext, v.SeedPlaintext},
		v.RetiredKeyID: {v.RetiredSeedCiphertext, v.RetiredSeedPlaintext},
	} {
		if p, err := k.Decrypt(id, unhex(t, seed[0])); err != nil || string(p) != seed[1] {
			t.Errorf("%s: %q, %v", id, p, err)
		}
	}
	if !bytes.Equal(k.Marshal(), file) || !bytes.Equal(k.Anchor().Marshal(), golden(t, "anchor.json")) {
		t.Error("the golden files are not written as they were")
	}
	if i := k.Info(); len(i.Retired) != 2 || i.Staged == nil || len(i.Nodes) != 2 || i.Revision != 6 {
		t.Errorf("%+v", i)
	}
	if _, err := k.OpenStaged(newKEK(t, 0xc1)); err != nil {
		t.Error(err)
	}
}
