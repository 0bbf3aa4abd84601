package main

import (
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
)

func (a *app) newRotate() *cobra.Command {
	return &cobra.Command{
		Use:   "rotate",
		Short: "Make a fresh KEK the current one",
		Long: `Make a fresh KEK the current one, sealed as the present one is. The former KEK is
retired: it stays in the keyring and still decrypts.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := operate(cmd.Context(), a, admin.Rotate, admin.RotateRequest{}, unlocked((*node).rotate))
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
}
