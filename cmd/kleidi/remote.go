package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
)

// operate runs a verb where the keyring's one writer is: in the running serve,
// or, where none runs, here, under the lock on the state folder.
func operate[Req, Resp any](ctx context.Context, a *app, verb admin.Verb[Req, Resp], req Req, here func(*node, context.Context, Req) (Resp, error)) (Resp, error) {
	var none Resp
	cfg, err := a.config()
	if err != nil {
		return none, err
	}
	client, err := admin.Dial(ctx, cfg.Admin.Socket)
	if err == nil {
		return admin.Call(ctx, client, verb, req)
	}
	if !errors.Is(err, admin.ErrNotRunning) {
		return none, err
	}
	log := slog.New(slog.DiscardHandler) // the result says it all
	if a.logLevel != "" {
		log = logger(cfg)
	}
	n, err := newNode(cfg, log, nil)
	if err != nil {
		return none, err
	}
	defer n.close()
	defer n.saySpent(os.Stderr)
	return here(n, ctx, req)
}

// saySpent says what a command without serve has used up: what was unwrapped is in its
// memory alone, and ends with it.
func (n *node) saySpent(w io.Writer) {
	if n.vault != nil && n.vault.Unwrapped() {
		fmt.Fprintf(w, "note: the wrapping token in vault.auth.secretIDFile is spent, and the secret ID that it held ends with this command; put a new wrapping token into %s before kleidi serve starts, or the next command without it\n", n.cfg.Vault.Auth.SecretIDFile)
	}
}

// unlocked is an operation that needs the keyring open first.
func unlocked[Req, Resp any](f func(*node, context.Context, Req) (Resp, error)) func(*node, context.Context, Req) (Resp, error) {
	return func(n *node, ctx context.Context, req Req) (Resp, error) {
		var none Resp
		if err := n.own(); err != nil {
			return none, err
		}
		if err := n.unlocker.Unlock(ctx); err != nil {
			return none, err
		}
		return f(n, ctx, req)
	}
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
