//go:build cgo

package hsm

import (
	"os"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// TestPIN: the flags tell of wrong PINs until the token locks, and to read them costs none,
// also if the configured PIN is wrong.
func TestPIN(t *testing.T) {
	b, triesFile := habits(t)
	w := b.generated(t, 0, "kek")
	slot := must[seal.Slot](t)(w.Wrap(t.Context(), newKEK(t)))
	counted := wrongPINs(t, triesFile)
	label := b.tokens[0]
	for count, want := range map[string]PIN{
		"0": {Module: b.module, TokenLabel: label},
		"1": {Module: b.module, TokenLabel: label, CountLow: true},
		"2": {Module: b.module, TokenLabel: label, CountLow: true, FinalTry: true},
		"3": {Module: b.module, TokenLabel: label, Locked: true},
	} {
		ok(t, os.WriteFile(triesFile, []byte(count), 0o600))
		setPIN(t, w, wrongPIN)
		for range 3 {
			got := must[PIN](t)(w.PIN(t.Context()))
			if got != want {
				t.Errorf("after %s wrong PINs: %+v, want %+v", count, got, want)
			}
		}
		counted(count)
	}
	ok(t, os.WriteFile(triesFile, []byte("0"), 0o600))
	refuses(t, w, slot, seal.CauseCredentials, "PIN")
	counted("1")
	ok(t, os.Remove(w.config.PINFile))
	if got := must[PIN](t)(w.PIN(t.Context())); !got.CountLow {
		t.Errorf("without a file of the PIN: %+v", got)
	}
}
