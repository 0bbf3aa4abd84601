package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/beezy-dev/kleidi/cmd/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal/store"
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
	n, err := offline(cfg)
	if err != nil {
		return none, err
	}
	defer n.close()
	return here(n, ctx, req)
}

// offline is the node without a running serve.
func offline(cfg *config.Config) (*node, error) {
	n, err := newNode(cfg, logger(cfg), nil)
	if err != nil {
		return nil, err
	}
	if err := n.state.acquire(); err != nil {
		if errors.Is(err, store.ErrLocked) {
			return nil, fmt.Errorf("state.dir %s: %w, and nothing answers on %s; see that both use the same configuration", cfg.State.Dir, err, cfg.Admin.Socket)
		}
		return nil, fmt.Errorf("state.dir: %w", err)
	}
	return n, nil
}

// unlocked is an operation that needs the keyring open first.
func unlocked[Req, Resp any](f func(*node, context.Context, Req) (Resp, error)) func(*node, context.Context, Req) (Resp, error) {
	return func(n *node, ctx context.Context, req Req) (Resp, error) {
		if err := n.unlocker.Unlock(ctx); err != nil {
			var none Resp
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
