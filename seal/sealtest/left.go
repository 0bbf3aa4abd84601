package sealtest

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// settle bounds how long the suite waits for what a wrapper left to go away.
const settle = 10 * time.Second

// left is what a wrapper could leave behind in the process.
type left struct{ goroutines, files, secrets int }

func count(t *testing.T) left {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return left{runtime.NumGoroutine(), len(files), strings.Count(string(maps), "secretmem")}
}

// testNothingLeft: once the caller has closed what it got, nothing is left of
// calls that succeed or fail: no goroutine, no open file, no Secret.
func testNothingLeft(t *testing.T, h Harness) {
	kek := h.newKEK(t)
	slot := h.wrap(t, kek) // what a backend keeps for good is there after the first call
	h.unwrap(t, slot).Close()
	damaged := slot
	damaged.Data = bytes.Replace(slot.Data, []byte("A"), []byte("B"), 1)
	before := count(t)
	for range 4 {
		h.roundTrip(t, kek)
		for _, data := range []json.RawMessage{damaged.Data, slot.Data[:len(slot.Data)/2], nil} {
			damaged.Data = data
			if kek, err := h.Wrapper.Unwrap(t.Context(), damaged); err == nil {
				kek.Close()
			}
		}
		if kek, err := h.Other.Unwrap(t.Context(), slot); err == nil {
			kek.Close()
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), settle)
	defer cancel()
	after := count(t)
	for after.goroutines > before.goroutines || after.files > before.files || after.secrets > before.secrets {
		if ctx.Err() != nil {
			t.Fatalf("before: %+v, after: %+v", before, after)
		}
		runtime.Gosched()
		after = count(t)
	}
}

// FindSecret names the encoding in which text holds secret, or returns "".
func FindSecret(text string, secret []byte) string {
	lower := strings.ToLower(text)
	switch {
	case strings.Contains(text, string(secret)):
		return "raw"
	case strings.Contains(lower, hex.EncodeToString(secret)):
		return "hexadecimal"
	}
	for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		// Inside other bytes the secret starts at any of three positions of a
		// base64 group; the characters that it shares with its neighbours don't count.
		for shift := range 3 {
			padded := enc.EncodeToString(append(make([]byte, shift), secret...))
			inner := padded[[]int{0, 2, 3}[shift] : len(padded)-1]
			if strings.Contains(text, inner) {
				return "base64"
			}
		}
	}
	return ""
}
