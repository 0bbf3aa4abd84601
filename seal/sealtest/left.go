package sealtest

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"
)

// settle is how long the suite waits for goroutines, files and Secrets of a wrapper to
// go away.
const settle = 2 * time.Minute

// left counts what a wrapper can leave behind in the process.
type left struct{ goroutines, files, secrets int }

func count(t *testing.T) left {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return left{runtime.NumGoroutine(), len(files), secrets(t)}
}

// secrets returns the size of the memory of all Secrets that are not closed, in KiB.
// The flags of a mapping tell which memory that is: Secrets are left out of core files
// and of child processes, and nothing else is.
func secrets(t testing.TB) (size int) {
	t.Helper()
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	var mapping int
	for line := range strings.Lines(string(smaps)) {
		if n, _ := fmt.Sscanf(line, "Size: %d kB", &mapping); n == 1 {
			continue
		}
		flags, ok := strings.CutPrefix(line, "VmFlags:")
		has := func(f string) bool { return slices.Contains(strings.Fields(flags), f) }
		if ok && has("dd") && (has("dc") || has("wf")) {
			size += mapping
		}
	}
	return size
}

// NoSecretLeft runs f and fails if it leaves a Secret open that the garbage collector
// would have to close.
func NoSecretLeft(t testing.TB, f func()) {
	t.Helper()
	runtime.GC() // Secrets of earlier tests
	runtime.GC() // and those that only their cleanups referred to
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	before := secrets(t)
	f()
	if after := secrets(t); after > before {
		t.Errorf("%d KiB of Secrets before, %d KiB after", before, after)
	}
}

// FindSecret returns the name of the encoding in which text holds secret, or "" if text
// does not hold it.
func FindSecret(text string, secret []byte) string {
	lower := strings.ToLower(text)
	switch {
	case strings.Contains(text, string(secret)):
		return "raw"
	case strings.Contains(lower, hex.EncodeToString(secret)):
		return "hexadecimal"
	}
	for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		// The secret may start at any of three positions of a base64 group. Characters
		// that encode bytes of its neighbours too are left out.
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
