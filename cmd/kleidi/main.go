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

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	code := run(ctx, &results{file: os.Stdout}, os.Stderr, os.Args[1:])
	stop()
	os.Exit(code)
}
