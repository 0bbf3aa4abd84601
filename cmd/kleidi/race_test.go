//go:build race

package main

import "os"

// Under the race detector, the binary is built with it too. It would wait for a
// second at its end, to report what other threads are about to find.
func init() {
	buildFlags = append(buildFlags, "-race")
	os.Setenv("GORACE", "atexit_sleep_ms=0")
}
