package main

import (
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
		Long: `Make a fresh KEK the current one, sealed as the present one is. The former KEK is
retired: it stays in the keyring and still decrypts.

The fresh KEK is wrapped by every wrapper that the present one is, and by the token or
the server that unlock.order names and that had no slot. Where one of them can't be
reached nothing is changed, unless --skip-slot names it: status shows the missing slot
then until kleidi slot add has made it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := operate(cmd.Context(), a, operation.Rotate, req)
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
	cmd.Flags().StringArrayVar(&req.SkipSlots, "skip-slot", nil, "do without this slot for now, as kleidi slot list names it; may be repeated")
	cmd.Flags().BoolVar(&req.AcceptDataLoss, "accept-data-loss", false, "skip the last recovery slot as well: if the TPM or the machine fails, all Secrets are lost")
	_ = cmd.RegisterFlagCompletionFunc("skip-slot", a.slotNamesOf)
	return cmd
}
