package vault

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/vault/internal/transitslot"
)

// golden is a slot of the first version of the format, which must be read for ever.
const golden = `{"format":1,"namespace":"team/a","mount":"transit","key":"kleidi",` +
	`"ciphertext":"vault:v3:8SDd3WHDOjf7mq69CyCqYjBXAiQQAVZRkFM13ok481zoCmHnSeDX9vyf7w=="}`

func TestGoldenSlot(t *testing.T) {
	c, err := sound().complete()
	if err != nil {
		t.Fatal(err)
	}
	c.Namespace = "team/a"
	slot := seal.Slot{Type: seal.TypeVault, Data: json.RawMessage(golden)}
	ciphertext, err := c.ciphertext(slot)
	if err != nil {
		t.Fatal(err)
	}
	if v, err := Version(slot); err != nil || v != 3 {
		t.Errorf("version %d, %v; want 3", v, err)
	}
	written, err := c.slot(ciphertext)
	if err != nil {
		t.Fatal(err)
	}
	if string(written.Data) != golden {
		t.Errorf("written:\n%s\nwant:\n%s", written.Data, golden)
	}
}

// TestSlotsThatAreNotOpened: slots of others are ErrNotMine, damaged ones are corrupt, and
// neither is sent to the server.
func TestSlotsThatAreNotOpened(t *testing.T) {
	f := newFake(t, nil)
	w := newWrapper(t, f.config())
	for data, notMine := range map[string]bool{
		`{"format":1,"namespace":"a","mount":"transit","key":"kleidi","ciphertext":"vault:v1:AAAA"}`:    true,
		`{"format":1,"mount":"other","key":"kleidi","ciphertext":"vault:v1:AAAA"}`:                      true,
		`{"format":1,"mount":"transit","key":"other","ciphertext":"vault:v1:AAAA"}`:                     true,
		`{"format":2,"mount":"transit","key":"kleidi","ciphertext":"vault:v1:AAAA"}`:                    false,
		`{"mount":"transit","key":"kleidi","ciphertext":"vault:v1:AAAA"}`:                               false,
		`{"format":1,"mount":"transit","key":"kleidi","ciphertext":"vault:v1:AAAA","address":"https:"}`: false,
		`{"format":1,"mount":"transit","key":"kleidi","ciphertext":"vault:v1:AA\",\"a\":\"AA"}`:         false,
	} {
		_, err := w.Unwrap(t.Context(), seal.Slot{Type: seal.TypeVault, Data: json.RawMessage(data)})
		if errors.Is(err, seal.ErrNotMine) != notMine || !notMine && seal.CauseOf(err) != seal.CauseSlotCorrupt {
			t.Errorf("%s: %v", data, err)
		}
	}
	if len(f.requests) > 0 {
		t.Errorf("%d requests", len(f.requests))
	}
}

// TestPlaintextOfAnotherSize: a slot whose plaintext does not have a KEK's size is
// refused. Anyone who may encrypt with the key can make such a slot.
func TestPlaintextOfAnotherSize(t *testing.T) {
	w := newWrapper(t, newFake(t, at("transit/decrypt/kleidi", 200, `{"data":{"plaintext":"c2hvcnQ="}}`)).config())
	_, err := w.Unwrap(t.Context(), seal.Slot{Type: seal.TypeVault, Data: json.RawMessage(
		`{"format":1,"mount":"transit","key":"kleidi","ciphertext":"vault:v1:AAAA"}`)})
	checkError(t, err, seal.CauseSlotCorrupt, nil, "it holds no KEK")
}

// FuzzSlot: any slot gives a ciphertext of Vault's form, seal.ErrNotMine, or a typed error.
func FuzzSlot(f *testing.F) {
	f.Add([]byte(golden))
	f.Add([]byte(`{"format":1,"mount":"transit","key":"kleidi","ciphertext":"vault:v1:AAAA"}`))
	f.Add([]byte(`{"Format":1,"mount":"transit","key":"kleidi","ciphertext":"vault:v1:AAAA"}`))
	f.Add([]byte(`{"format":1.0,"mount":null,"key":"kleidi","ciphertext":["vault:v1:AAAA"]}`))
	f.Add([]byte(`{}{}`))
	f.Add([]byte(`null`))
	c, err := sound().complete()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		slot := seal.Slot{Type: seal.TypeVault, Data: data}
		ciphertext, err := c.ciphertext(slot)
		if err == nil {
			if _, err := transitslot.Version(ciphertext); err != nil {
				t.Errorf("%q: %v", ciphertext, err)
			}
			again, err := c.slot(ciphertext)
			if err != nil {
				t.Fatal(err)
			}
			if same, err := c.ciphertext(again); err != nil || same != ciphertext {
				t.Errorf("%q, %v; want %q", same, err, ciphertext)
			}
			return
		}
		if !errors.Is(err, seal.ErrNotMine) && seal.CauseOf(err) != seal.CauseSlotCorrupt {
			t.Errorf("%q: %v", data, err)
		}
	})
}
