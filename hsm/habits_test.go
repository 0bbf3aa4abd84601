//go:build cgo

package hsm

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

// habits returns SoftHSM behind the module in testdata/module, and the file in which that
// module counts wrong PINs.
func habits(t *testing.T) (b *backend, triesFile string) {
	t.Helper()
	b = softHSM(t)
	dir := t.TempDir()
	own := filepath.Join(dir, "module.so")
	if out, err := exec.Command("cc", "-shared", "-fPIC", "-o", own, "testdata/module/module.c", "-ldl").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Setenv("KLEIDI_TEST_MODULE", b.module)
	triesFile = filepath.Join(dir, "tries")
	t.Setenv("KLEIDI_TEST_TRIES", triesFile)
	b.module = own
	return b, triesFile
}

// refuses demands that w neither wraps nor opens. Its errors have the cause, contain
// text and show no PIN.
func refuses(t *testing.T, w *Wrapper, slot seal.Slot, cause seal.Cause, text string) {
	t.Helper()
	_, wrapErr := w.Wrap(t.Context(), newKEK(t))
	kek, err := w.Unwrap(t.Context(), slot)
	if err == nil {
		kek.Close()
	}
	checkFault(t, wrapErr, cause, text)
	checkFault(t, err, cause, text)
}

const wrongPIN = "kleidi-wrong-9"

func setPIN(t *testing.T, w *Wrapper, pin string) {
	t.Helper()
	ok(t, os.WriteFile(w.config.PINFile, []byte(pin+"\n"), 0o600))
}

// wrongPINs returns a function that checks the number of wrong PINs that the token counted.
func wrongPINs(t *testing.T, triesFile string) func(want string) {
	return func(want string) {
		t.Helper()
		if got := strings.TrimSpace(string(must[[]byte](t)(os.ReadFile(triesFile)))); got != want {
			t.Fatalf("%s wrong PINs, want %s", got, want)
		}
	}
}

// TestWrongPIN: a wrong PIN costs one try, however often and with however many wrappers
// kleidi tries to unlock. kleidi never uses the last try, and does not log in to a locked
// token. Each state is over as soon as its reason is.
func TestWrongPIN(t *testing.T) {
	b, triesFile := habits(t)
	w := b.generated(t, 0, "kek")
	kek := newKEK(t)
	slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
	counted := wrongPINs(t, triesFile)
	setPIN(t, w, wrongPIN)
	refuses(t, w, slot, seal.CauseCredentials, "PIN")
	for range 20 {
		refuses(t, w, slot, seal.CauseCredentials, "refused this PIN before")
		refuses(t, newWrapper(t, w.config), slot, seal.CauseCredentials, "a wrong PIN was entered since")
	}
	counted("1")

	setPIN(t, w, testPIN)
	opens(t, w, slot, kek)
	counted("0")

	for _, pin := range []string{wrongPIN, wrongPIN + "0", wrongPIN + "1"} {
		setPIN(t, w, pin)
		refuses(t, w, slot, seal.CauseCredentials, "PIN")
	}
	counted("2")
	refuses(t, w, slot, seal.CauseCredentials, "one more wrong PIN locks it")
	setPIN(t, w, testPIN) // not even the right one: nobody can know
	refuses(t, w, slot, seal.CauseCredentials, "kleidi leaves that try to you")
	counted("2")

	ok(t, os.WriteFile(triesFile, []byte("3\n"), 0o600))
	refuses(t, w, slot, seal.CauseCredentials, "locked")
	ok(t, os.WriteFile(triesFile, []byte("0\n"), 0o600)) // as the security officer resets it
	opens(t, w, slot, kek)
}

// TestOwnIV: a token may replace the IV by one of its own.
func TestOwnIV(t *testing.T) {
	b, _ := habits(t)
	t.Setenv("KLEIDI_TEST_OWN_IV", "1")
	w := b.generated(t, 0, "kek", keyslot.MechGCM)
	kek := newKEK(t)
	ivs := map[string]bool{}
	for range 4 {
		slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
		opens(t, w, slot, kek)
		var d keyslot.Data
		ok(t, json.Unmarshal(slot.Data, &d))
		ivs[string(d.IV)] = true
	}
	if len(ivs) != 4 {
		t.Errorf("%d IVs for 4 slots", len(ivs))
	}
}
