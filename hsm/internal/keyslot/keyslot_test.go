package keyslot

import (
	"crypto/rsa"
	"math/big"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

const goldenSlot = `{"form":"pkcs11-v1","mechanism":"aes-gcm","token":{"label":"kleidi-a","serial":"ce3c1e1af5af1d86"},"key":{"label":"kek","id":"0102"},` +
	`"iv":"AAECAwQFBgcICQoL","ciphertext":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"}`

// TestGoldenSlot: kleidi reads this form of a keyslot for ever.
func TestGoldenSlot(t *testing.T) {
	d, err := Parse(seal.Slot{Type: seal.TypePKCS11, Data: []byte(goldenSlot)})
	if err != nil {
		t.Fatal(err)
	}
	s, err := d.Slot()
	if err != nil || string(s.Data) != goldenSlot {
		t.Errorf("%s, %v", s.Data, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(goldenSlot))
	f.Add([]byte(strings.Replace(goldenSlot, "aes-gcm", "aes-kwp", 1)))
	f.Add([]byte(`{"form":"pkcs11-v1","form":"pkcs11-v1"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := Parse(seal.Slot{Type: seal.TypePKCS11, Data: data})
		if err != nil {
			if seal.CauseOf(err) != seal.CauseSlotCorrupt || len(err.Error()) > 1000 {
				t.Errorf("%v", err)
			}
			return
		}
		s, err := d.Slot()
		if err != nil {
			t.Fatalf("what was read can't be written: %v", err)
		}
		again, err := Parse(s)
		if err != nil {
			t.Fatalf("%s: %v", s.Data, err)
		}
		if second, err := again.Slot(); err != nil || string(second.Data) != string(s.Data) {
			t.Errorf("%s became %s: %v", s.Data, second.Data, err)
		}
	})
}

// TestPublicDigest: the limits of RSA keys.
func TestPublicDigest(t *testing.T) {
	for _, row := range []struct {
		bits uint
		e    int
		ok   bool
	}{
		{MinRSA - 1, 65537, false}, {MinRSA, 65537, true}, {MaxRSA, 65537, true}, {MaxRSA + 1, 65537, false},
		{MinRSA, 1, false}, {MinRSA, 2, false}, {MinRSA, 3, true}, {MinRSA, 65536, false},
	} {
		n := new(big.Int).SetBit(big.NewInt(1), int(row.bits)-1, 1)
		if _, err := PublicDigest(&rsa.PublicKey{N: n, E: row.e}); (err == nil) != row.ok {
			t.Errorf("%d bits, exponent %d: %v", row.bits, row.e, err)
		}
	}
}

// TestSlotLimits: each limit of a keyslot's data, at it and over it.
func TestSlotLimits(t *testing.T) {
	text := func(n int) string { return strings.Repeat("x", n) }
	good := func() *Data {
		return &Data{Form: Form1, Mechanism: MechGCM, Key: KeyName{Label: "kek", ID: HexID{1}}, IV: make([]byte, MinIV), Ciphertext: make([]byte, seal.KEKSize+16)}
	}
	for name, row := range map[string]struct {
		change func(*Data)
		good   bool
	}{
		"as it is":          {func(*Data) {}, true},
		"form":              {func(d *Data) { d.Form = "2" }, false},
		"token label":       {func(d *Data) { d.Token.Label = text(MaxTokenLabel) }, true},
		"token label over":  {func(d *Data) { d.Token.Label = text(MaxTokenLabel + 1) }, false},
		"token serial":      {func(d *Data) { d.Token.Serial = text(MaxTokenSerial) }, true},
		"token serial over": {func(d *Data) { d.Token.Serial = text(MaxTokenSerial + 1) }, false},
		"key label over":    {func(d *Data) { d.Key.Label = text(MaxKeyLabel + 1) }, false},
		"key id over":       {func(d *Data) { d.Key.ID = make(HexID, MaxKeyID+1) }, false},
		"label only":        {func(d *Data) { d.Key.ID = nil }, true},
		"id only":           {func(d *Data) { d.Key.Label = "" }, true},
		"no key":            {func(d *Data) { d.Key.Label, d.Key.ID = "", nil }, false},
		"short IV":          {func(d *Data) { d.IV = make([]byte, MinIV-1) }, false},
		"long IV":           {func(d *Data) { d.IV = make([]byte, MaxIV+1) }, false},
		"a public key":      {func(d *Data) { d.Key.Public = make(HexID, 32) }, false},
		"IV of another":     {func(d *Data) { d.Mechanism = MechKWP }, false},
		"oaep, no public":   {func(d *Data) { d.Mechanism, d.IV = MechOAEP, nil }, false},
		"oaep":              {func(d *Data) { d.Mechanism, d.IV, d.Key.Public = MechOAEP, nil, make(HexID, 32) }, true},
		"mechanism":         {func(d *Data) { d.Mechanism, d.IV = "none", nil }, false},
		"a KEK in plain":    {func(d *Data) { d.Ciphertext = make([]byte, seal.KEKSize) }, false},
		"ciphertext":        {func(d *Data) { d.Ciphertext = make([]byte, MaxCiphertext) }, true},
		"ciphertext over":   {func(d *Data) { d.Ciphertext = make([]byte, MaxCiphertext+1) }, false},
	} {
		d := good()
		row.change(d)
		if err := d.check(); (err == nil) != row.good {
			t.Errorf("%s: %v", name, err)
		}
	}
}
