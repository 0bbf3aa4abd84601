//go:build !manpages

// Command kleidi is a KMS v2 provider for Kubernetes whose key is sealed to the
// machine's TPM.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// main cancels the context on an interrupt or on SIGTERM, and does not end at once: a
// change of the keyring that has begun is completed. It calls stop itself, because os.Exit
// runs no deferred call.
func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	code := run(ctx, &results{file: os.Stdout}, os.Stderr, os.Args[1:])
	stop()
	os.Exit(code)
}
