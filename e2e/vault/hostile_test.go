package vault

import (
	"encoding/base64"
	"net/http"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/site"
	"github.com/beezy-dev/kleidi/seal"
)

// TestServeHostileSlots plays an attacker who can write the keyring's file but can't make
// its MAC. kleidi never dials the server that a slot names.
func TestServeHostileSlots(t *testing.T) {
	t.Parallel()
	s := newHost(t, "[vault]")
	ciphertext := func(change func(text string) string) func(seal.Slot) []byte {
		return site.Edit(func(d map[string]any) { d["ciphertext"] = change(d["ciphertext"].(string)) })
	}
	flip := func(text string) string {
		version, encoded, _ := strings.Cut(strings.TrimPrefix(text, "vault:"), ":")
		b, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil {
			t.Fatal(err)
		}
		b[20] ^= 1
		return "vault:" + version + ":" + base64.StdEncoding.EncodeToString(b)
	}
	damaged := func(name, says string, make_ func(seal.Slot) []byte) site.Forgery {
		return site.Forgery{Name: name, Cause: seal.CauseSlotCorrupt, Says: []string{says, "kleidi keyring restore"}, Make: make_}
	}
	s.Hostile(seal.TypeVault, []site.Forgery{
		damaged("flipped bit", "vault", ciphertext(flip)),
		damaged("truncated ciphertext", "vault", ciphertext(func(text string) string { return text[:len(text)-8] })),
		damaged("no ciphertext", "vault", ciphertext(func(string) string { return "vault:v1" })),
		damaged("oversized ciphertext", "at most 4096", ciphertext(func(text string) string { return text + strings.Repeat("A", 4096) })),
		damaged("a server to ask", "it does not have the form that kleidi writes", site.Edit(func(d map[string]any) { d["address"] = "https://127.0.0.1:1" })),
		{Name: "another key's", Cause: seal.CauseNoSlot, Says: []string{"vault"}, Make: site.Edit(func(d map[string]any) { d["key"] = "../../sys/seal" })},
		{Name: "another KEK, by the same key", Cause: seal.CauseSlotCorrupt, Says: []string{"the slot holds the KEK of key ID"},
			Make: func(seal.Slot) []byte { return wrap(t, s.scene.w, newKEK(t)).Data }},
		{Name: "oversized slot", Cause: seal.CauseKeyringCorrupt, Says: []string{"at most 65536"}, Make: site.Oversized},
	})
	s.saidNoSecret(t, s.SlotOf(seal.TypeVault))
}

// TestServeDownDuringRotation: the server disappears while it wraps the new KEK.
func TestServeDownDuringRotation(t *testing.T) {
	t.Parallel()
	s := newHost(t, "[vault]")
	before := string(s.Stored())
	s.scene.gate.stall()
	refused := make(chan error)
	go func() {
		_, err := s.Try("rotate")
		refused <- err
	}()
	node.Eventually(t, notices, "kleidi asks Vault", s.scene.gate.wasAsked)
	s.scene.gate.shut()
	if err := <-refused; err == nil {
		t.Error("the rotation succeeds")
	} else {
		site.WantIn(t, "kleidi rotate", err.Error(), "wrap the new KEK for the vault slot", "start the server")
	}
	if before != string(s.Stored()) {
		t.Error("the keyring was changed")
	}
	s.WaitSays(http.StatusOK, "ok")
	s.Decrypts()
	s.scene.gate.open()
	s.Do("rotate")
	s.Do("slot test", "opens")
	s.Decrypts()
}
