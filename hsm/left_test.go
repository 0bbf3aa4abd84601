//go:build cgo

package hsm

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/hsm/internal/cheap"
	"github.com/beezy-dev/kleidi/hsm/internal/cryptoki"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/sealtest"
)

// manyWraps is the number of wraps that must leave nothing behind.
const manyWraps = 10_000

// rounds are the parts of these wraps. The C heap grows in one of them by the 250 kB that a
// new thread keeps for itself (kleidi_scrub). A leak makes it grow in each of them.
const rounds = 5

// heapNoise is how much the C heap may grow in the round in which it grows least, in bytes. A
// leak of 9 bytes for each wrap with SoftHSM is more than that, and so is one of 33 bytes
// with NSS, or of the parameters of AES-GCM.
const heapNoise = 16 << 10

// left counts what wraps can leave behind in the process.
type left struct{ goroutines, files, secrets, pages, heap int }

// count returns the current numbers. pages is the resident memory in steps of 16 MiB. heap
// is the size of the C heap in bytes: a session, a handle or a parameter that is left
// behind takes some bytes each time.
func count(t *testing.T) left {
	t.Helper()
	files := must[[]os.DirEntry](t)(os.ReadDir("/proc/self/fd"))
	maps := must[[]byte](t)(os.ReadFile("/proc/self/maps"))
	var size, resident int
	_, err := fmt.Sscan(string(must[[]byte](t)(os.ReadFile("/proc/self/statm"))), &size, &resident)
	ok(t, err)
	return left{runtime.NumGoroutine(), len(files), strings.Count(string(maps), "secretmem"), resident * os.Getpagesize() >> 24, cheap.InUse()}
}

func TestNothingLeftOfManyWraps(t *testing.T) {
	for b, wraps := range map[*backend]int{softHSM(t): manyWraps, nss(t): manyWraps / 4} {
		t.Run(b.name, func(t *testing.T) {
			w := b.generated(t, 0, "kek")
			kek := newKEK(t)
			slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
			for range wraps / 20 { // each thread fills the store that it mallocs from
				must[seal.Slot](t)(w.Wrap(t.Context(), kek))
			}
			runtime.GC()
			before := count(t)
			least := math.MaxInt
			for range rounds {
				former := count(t).heap
				for range wraps / rounds {
					must[seal.Slot](t)(w.Wrap(t.Context(), kek))
				}
				runtime.GC()
				least = min(least, count(t).heap-former)
			}
			opens(t, w, slot, kek)
			t.Logf("bytes of C more in each round: %d or more", least)
			if least > heapNoise {
				t.Errorf("%d wraps leave %d bytes of C behind, in each round", wraps/rounds, least)
			}
			settles(t, func() bool {
				after := count(t)
				return after.goroutines <= before.goroutines && after.files <= before.files && after.secrets <= before.secrets && after.pages <= before.pages+1
			})
			admin(t, b.module, b.initArgs, func(p cryptoki.Functions) {
				for _, slot := range must[[]uint](t)(p.GetSlotList(true)) {
					if info := must[tokenInfo](t)(p.GetTokenInfo(slot)); info.SessionCount != 0 && info.SessionCount != ^uint(0) {
						t.Errorf("token %v counts %d sessions", info.Label, info.SessionCount)
					}
				}
			})
		})
	}
}

// TestSecretsAreClosed: every Secret is closed. The garbage collector, which would close a
// forgotten one, is off here.
func TestSecretsAreClosed(t *testing.T) {
	b := softHSM(t)
	w := b.generated(t, 0, "kek")
	kek := newKEK(t)
	slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
	damaged := slot
	damaged.Data = bytes.Replace(slot.Data, []byte(`"ciphertext":"`), []byte(`"ciphertext":"AAAA`), 1)
	runtime.GC()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	before := count(t).secrets
	for range 10 {
		opens(t, w, must[seal.Slot](t)(w.Wrap(t.Context(), kek)), kek)
		must[seal.Slot](t)(w.WrapLike(t.Context(), kek, slot))
		if _, err := w.Unwrap(t.Context(), damaged); seal.CauseOf(err) != seal.CauseSlotCorrupt {
			t.Fatal(err)
		}
	}
	setPIN(t, w, wrongPIN)
	for range 10 {
		_, err := w.Wrap(t.Context(), kek)
		checkFault(t, err, seal.CauseCredentials, "PIN")
	}
	settles(t, func() bool { return count(t).secrets <= before })
}

// settles waits until goroutines have ended that run on after their result is delivered.
func settles(t *testing.T, done func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !done(); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatalf("left behind: %+v", count(t))
		}
	}
}

// TestMemory: after an operation, KEK and PIN are nowhere but in their Secrets.
func TestMemory(t *testing.T) {
	for _, b := range []*backend{softHSM(t), nss(t)} {
		for _, name := range b.only {
			t.Run(b.name+"/"+name, func(t *testing.T) {
				w := b.keyFor(t, 0, name, name)
				kek := newKEK(t)
				watch := sealtest.NewWatch()
				watch.Add("KEK", kek)
				slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
				if found := watch.Find(t); len(found) > 0 {
					t.Errorf("after Wrap: %q", found)
				}
				opens(t, w, slot, kek)
				if found := watch.Find(t); len(found) > 0 {
					t.Errorf("after Unwrap: %q", found)
				}
			})
		}
	}
}

// TestPINInMemory: a login leaves no copy of the PIN. Only other processes have the PIN of
// this test in plain.
func TestPINInMemory(t *testing.T) {
	b := softHSM(t)
	secret := must[*seal.Secret](t)(seal.Memory{}.New(24))
	defer secret.Close()
	file := filepath.Join(t.TempDir(), "pin")
	secret.With(func(s []byte) {
		raw := make([]byte, len(s)/2)
		rand.Read(raw)
		hex.Encode(s, raw)
		clear(raw)
		ok(t, os.WriteFile(file, s, 0o600))
	})
	cmd := exec.Command("sh", "-c", `softhsm2-util --init-token --free --label watched --so-pin 12345678 --pin "$(cat "$1")"`, "sh", file)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	w := newWrapper(t, Config{Module: b.module, URI: "pkcs11:token=watched;object=kek", PINFile: file})
	watch := sealtest.NewWatch()
	watch.Add("PIN", secret)
	must[Key](t)(w.GenerateKey(t.Context()))
	kek := newKEK(t)
	opens(t, w, must[seal.Slot](t)(w.Wrap(t.Context(), kek)), kek)
	if found := watch.Find(t); len(found) > 0 {
		t.Errorf("found %q", found)
	}
}
