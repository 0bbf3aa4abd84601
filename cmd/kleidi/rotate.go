package main

import (
	"errors"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/operation"
)

func newRotate(a *app) *cobra.Command {
	var req admin.RotateRequest
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Make a fresh KEK the current one",
		Long: `Make a fresh KEK the current one, sealed like the present one. The former KEK is
retired: it stays in the keyring and still decrypts.

The fresh KEK gets a slot for every slot of the present KEK, and for a token or server
in unlock.order that has no slot yet. If a wrapper can't be reached, the command
changes nothing. To go on without that slot, name it with --skip-slot: status then
shows the missing slot until kleidi slot add makes it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if req.AcceptDataLoss && len(req.SkipSlots) == 0 {
				return errors.New("--accept-data-loss goes with --skip-slot; name the recovery slot to skip, or leave it out")
			}
			s, err := operate(cmd.Context(), a, operation.Rotate, req)
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
	cmd.Flags().StringArrayVar(&req.SkipSlots, "skip-slot", nil, "leave out this slot for now, by its name in kleidi slot list; may be repeated")
	cmd.Flags().BoolVar(&req.AcceptDataLoss, "accept-data-loss", false, "skip the last recovery slot as well: if the TPM or the machine fails, all Secrets are lost")
	_ = cmd.RegisterFlagCompletionFunc("skip-slot", a.complete(slotNames))
	return cmd
}
