package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/follow"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
)

// exitWaiting is the exit code of a rotation or a removal that waits for nodes.
const exitWaiting = 3

// addWatchFlags registers the flags that say how long to watch.
func addWatchFlags(cmd *cobra.Command, o *follow.Options, wait, timeout string) {
	cmd.Flags().BoolVar(&o.Wait, "wait", onTerminal(), wait+" (default true on a terminal)")
	cmd.Flags().DurationVar(&o.Timeout, "timeout", 0, timeout)
	cmd.Flags().Lookup("wait").DefValue = "false" // the help is the same everywhere
}

// watchRotation shows the progress of a rotation of several nodes, and its result. The
// exit code is exitWaiting while nodes are missing.
func watchRotation(cmd *cobra.Command, a *app, o follow.Options, req admin.RotateRequest, s admin.KeyringState) error {
	o.Say = newPerson(cmd).Tell
	serve := follow.Serve{
		Rotate: func(ctx context.Context, req admin.RotateRequest) (admin.KeyringState, error) {
			return operate(ctx, a, operation.Rotate, req)
		},
		Progress: func(ctx context.Context) (admin.KeyringState, error) {
			return operate(ctx, a, operation.WatchRotation, admin.WatchRotationRequest{})
		},
	}
	s, replaced, err := follow.Rotation(cmd.Context(), o, serve, req, s)
	if err != nil {
		return err
	}
	if err := show(cmd, a, s, text.Rotation); err != nil {
		return err
	}
	if s.Rotation.Phase != admin.RotationDone {
		return &exitError{code: exitWaiting}
	}
	if replaced {
		return &seal.Error{Err: errors.New("the rotation was aborted, or replaced by another one"), Hint: "see kleidi keyring show"}
	}
	return nil
}
