package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/completion"
	"github.com/beezy-dev/kleidi/internal/follow"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
)

// newRotate returns the verb rotate. It shows the slots before a KEK is made, and asks
// about those that were changed from outside, because whoever added one would receive the
// fresh KEK. --continue and --abort add no slot, and ask nothing.
func newRotate(a *app) *cobra.Command {
	var req admin.RotateRequest
	var yes bool
	var watch follow.Options
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Make a fresh KEK the current one",
		Long: `Make a fresh KEK the current one, sealed like the present one. The former KEK is
retired: it stays in the keyring and still decrypts.

The fresh KEK gets a slot for every slot of the present KEK, and for a token, server or
KMS plugin in unlock.order that has no slot yet. If a wrapper can't be reached, the command
changes nothing. To go on without that slot, name it with --skip-slot: status then
shows the missing slot until kleidi slot add makes it.

The command first shows the slots that get the fresh KEK. If the keyring was changed, but not
by a command on this node, it asks about the difference, and fails without a terminal:
somebody who once held the KEK may have added a recovery recipient of their own.

With several nodes, the fresh KEK becomes current once every node has acknowledged it.
The running kleidi serve of this node drives the rotation; the command only watches it,
and may be interrupted. The exit code is 0 once every node announces the fresh KEK, and
3 while the rotation waits for the nodes that the command names. --continue drives it
from this node instead; --abort ends it before the fresh KEK is current.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if req.AcceptDataLoss && len(req.SkipSlots) == 0 {
				return seal.Errorf("", "name the recovery slot to skip, or leave it out", "--accept-data-loss goes with --skip-slot")
			}
			if !req.Continue && !req.Abort {
				if err := confirmSlots(cmd, a, &req, yes); err != nil {
					return err
				}
			}
			s, err := operate(cmd.Context(), a, operation.Rotate, req)
			if err != nil {
				return err
			}
			if s.Rotation != nil {
				return watchRotation(cmd, a, watch, req, s)
			}
			return show(cmd, a, s, text.State)
		},
	}
	cmd.Flags().StringArrayVar(&req.SkipSlots, "skip-slot", nil, "leave out this slot for now, by its name in kleidi slot list; may be repeated")
	cmd.Flags().BoolVar(&yes, "yes", false, "give the fresh KEK also to slots that no command on this node added, without asking")
	cmd.Flags().BoolVar(&req.AcceptDataLoss, "accept-data-loss", false, "skip the last recovery slot as well: if the TPM or the machine fails, all Secrets are lost")
	cmd.Flags().BoolVar(&req.Continue, "continue", false, "drive the rotation that is going on from this node, and watch it")
	cmd.Flags().BoolVar(&req.Abort, "abort", false, "end the rotation that is going on; its KEK is retired and never current")
	addWatchFlags(cmd, &watch, "with several nodes: watch until every node announces the fresh KEK", "with several nodes: watch no longer than this; the rotation goes on")
	cmd.MarkFlagsMutuallyExclusive("continue", "abort", "skip-slot")
	_ = cmd.RegisterFlagCompletionFunc("skip-slot", a.complete(completion.SlotNames))
	return cmd
}

// confirmSlots shows which slots receive the fresh KEK. If the slots were changed from
// outside, it asks, unless yes.
func confirmSlots(cmd *cobra.Command, a *app, req *admin.RotateRequest, yes bool) error {
	r, err := operate(cmd.Context(), a, operation.Status, admin.StatusRequest{})
	if err != nil {
		return err
	}
	if len(r.Slots) == 0 { // there is no keyring, as rotate will report
		return nil
	}
	text.Receivers(cmd.ErrOrStderr(), r, req.SkipSlots)
	if len(r.ChangedOutside) == 0 {
		return nil
	}
	if !yes {
		answer, _, err := inputOf(cmd).Ask("is each of these slots as you want it? Type yes to rotate:\n")
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("rotate: %w", err)
		}
		yes = answer == "yes"
	}
	if !yes {
		return &seal.Error{Err: errors.New("rotate: the keyring was changed from outside, and nobody has confirmed that; nothing was changed"), Hint: slotview.HintOutside}
	}
	for _, c := range r.ChangedOutside {
		req.Confirmed = append(req.Confirmed, c.ID)
	}
	return nil
}
