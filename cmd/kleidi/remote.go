package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/operation"
)

// operate runs an operation in the only process that may write the keyring: in the
// running serve or, if none runs, in this process, under the lock on the state folder.
func operate[Req, Resp any](ctx context.Context, a *app, o operation.Operation[Req, Resp], req Req) (Resp, error) {
	var none Resp
	cfg, err := a.config()
	if err != nil {
		return none, err
	}
	client, err := admin.Dial(ctx, cfg.Admin.Socket)
	defer sayWaiting(os.Stderr, cfg.TPM.Timeout)()
	if err == nil {
		return admin.Call(ctx, client, o.Verb, req)
	}
	if !errors.Is(err, admin.ErrNotRunning) {
		return none, err
	}
	log := slog.New(slog.DiscardHandler) // the result tells everything
	if a.logLevel != "" {
		log = logger(cfg)
	}
	n, err := node.New(cfg, log, nil)
	if err != nil {
		return none, err
	}
	defer n.Close()
	defer n.NoteSpent(os.Stderr)
	return o.Alone(ctx, n, req)
}

// patience is how long a command is silent.
const patience = 3 * time.Second

// sayWaiting says once that a command still waits, until it is stopped: a TPM may take as
// long as tpm.timeout to answer, and looks dead meanwhile.
func sayWaiting(w io.Writer, limit fmt.Stringer) (stop func() bool) {
	return time.AfterFunc(patience, func() {
		fmt.Fprintf(w, "[wait] no answer yet from the TPM, a token or a server; the TPM is given up after tpm.timeout, %v\n", limit)
	}).Stop
}

func printState(w io.Writer, s admin.KeyringState) {
	fmt.Fprintf(w, "current key ID  %s\n", s.CurrentKeyID)
	if s.Former != "" {
		fmt.Fprintf(w, "former key ID   %s\n", s.Former)
	}
	fmt.Fprintf(w, "revision        %d\n", s.Revision)
	for _, c := range s.Changes {
		fmt.Fprintf(w, "- %s\n", c)
	}
}
