//go:build race

package main

import "os"

// Under the race detector, the binary is built with it too. The binary would wait for a
// second at its end, to report races that other threads may still find.
func init() {
	buildFlags = append(buildFlags, "-race")
	os.Setenv("GORACE", "atexit_sleep_ms=0")
}
