package main

import (
	"context"
	"errors"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/internal/terminal"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
)

// operate runs an operation in the only process that may write the keyring: in the running
// serve or, if none runs, in this process, under the lock on the state folder. A serve
// that is there but fails to answer is an error, and never a reason to work here.
func operate[Req, Resp any](ctx context.Context, a *app, o operation.Operation[Req, Resp], req Req) (Resp, error) {
	var none Resp
	cfg, err := a.config()
	if err != nil {
		return none, err
	}
	client, err := admin.Dial(ctx, cfg.Admin.Socket)
	defer terminal.SayWaiting(os.Stderr, o.Awaits, cfg.TPM.Timeout)()
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
	result, err := o.Alone(ctx, n, req)
	return result, files.HintRoot(err)
}

// operateAndShow runs an operation on the keyring, and shows the keyring afterwards.
func operateAndShow[Req any](cmd *cobra.Command, a *app, o operation.Operation[Req, admin.KeyringState], req Req) error {
	s, err := operate(cmd.Context(), a, o, req)
	if err != nil {
		return err
	}
	return show(cmd, a, s, text.State)
}

// ask runs a verb that only a running serve can answer.
func ask[Req, Resp any](cmd *cobra.Command, a *app, verb admin.Verb[Req, Resp], req Req) (Resp, error) {
	var none Resp
	cfg, err := a.config()
	if err != nil {
		return none, err
	}
	client, err := admin.Dial(cmd.Context(), cfg.Admin.Socket)
	if errors.Is(err, admin.ErrNotRunning) {
		return none, seal.WithHint(err, "start it (systemctl start kleidi), since only kleidi serve can answer")
	}
	if err != nil {
		return none, err
	}
	return admin.Call(cmd.Context(), client, verb, req)
}
