package pkcs11

import (
	"encoding/base64"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/site"
	"github.com/beezy-dev/kleidi/seal"
)

// TestHostileSlots plays an attacker who can write the keyring's file but can't make its
// MAC.
func TestHostileSlots(t *testing.T) {
	k := newSoftHSM(t)
	s := newSite(t, k, "[pkcs11]")
	ciphertext := func(change func(b []byte) []byte) func(seal.Slot) []byte {
		return site.Edit(func(d map[string]any) {
			b, err := base64.StdEncoding.DecodeString(d["ciphertext"].(string))
			k.ok(err)
			d["ciphertext"] = change(b)
		})
	}
	damaged := func(name, says string, make_ func(seal.Slot) []byte) site.Forgery {
		return site.Forgery{Name: name, Cause: seal.CauseSlotCorrupt, Says: []string{says, "kleidi keyring restore"}, Make: make_}
	}
	s.Hostile(seal.TypePKCS11, []site.Forgery{
		damaged("flipped bit", "it does not open, but a KEK that the same key has just wrapped does", ciphertext(func(b []byte) []byte { b[7] ^= 1; return b })),
		damaged("truncated ciphertext", "it does not open, but a KEK that the same key has just wrapped does", ciphertext(func(b []byte) []byte { return b[:len(b)-1] })),
		damaged("oversized ciphertext", "a ciphertext of 4144 bytes", ciphertext(func(b []byte) []byte { return append(b, make([]byte, 4096)...) })),
		damaged("a module to load", `unknown field "module"`, site.Edit(func(d map[string]any) { d["module"] = k.path("softhsm2.conf") })),
		damaged("another mechanism", "mechanism", site.Edit(func(d map[string]any) { d["mechanism"] = "aes-ecb" })),
		{Name: "another key's", Cause: seal.CauseNoSlot, Says: []string{"pkcs11"},
			Make: site.Edit(func(d map[string]any) { d["key"] = map[string]any{"label": "other"} })},
		{Name: "another KEK, by the same key", Cause: seal.CauseSlotCorrupt, Says: []string{"the slot holds the KEK of key ID"}, Make: func(seal.Slot) []byte {
			kek, err := seal.Memory{}.NewKEK()
			k.ok(err)
			defer kek.Close()
			slot, err := k.wrapper().Wrap(t.Context(), kek)
			k.ok(err)
			return slot.Data
		}},
		{Name: "oversized slot", Cause: seal.CauseKeyringCorrupt, Says: []string{"at most 65536"}, Make: site.Oversized},
	})
	secrets := k.secrets()
	secrets["KEK"] = k.kek(s.SlotOf(seal.TypePKCS11))
	s.SaidNone(secrets)
}
