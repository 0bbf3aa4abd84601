package main

import (
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
)

func (a *app) newReseal() *cobra.Command {
	var dropNext bool
	cmd := &cobra.Command{
		Use:   "reseal",
		Short: "Seal the KEK to the present boot state, and revoke earlier slots",
		Long: `Seal the open KEK to the boot state of now, after a change of tpm.pcrs or tpm.bank for
instance, and revoke the slot of the earlier one: the TPM refuses it from then on,
even where someone kept its bytes. A suspension ends with it. A locked keyring can't
be resealed: after another kernel was booted unprepared, kleidi recover is the way.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := operate(cmd.Context(), a, admin.Reseal, admin.ResealRequest{DropNext: dropNext}, unlocked((*node).reseal))
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
	cmd.Flags().BoolVar(&dropNext, "drop-next", false, "revoke the slots for next boots as well")
	return cmd
}

// defaultBoots is what a firmware update by capsule takes.
const defaultBoots = 2

func (a *app) newSuspend() *cobra.Command {
	var req admin.SuspendRequest
	cmd := &cobra.Command{
		Use:   "suspend",
		Short: "Let other boots open the keyring for a while, before work that can't be predicted",
		Long: `Seal the open KEK to PCR 7 alone besides, so that a firmware update, for instance,
does not lock the node out. Whoever boots this machine meanwhile, with Secure Boot as
it is, gets the KEK. The TPM counts the boots and refuses more than --boots.

When the work is done, run kleidi reseal: it seals to what then runs, and revokes the
slot of the suspension.`,
		Example: `  kleidi suspend
  kleidi suspend --boots 3 --weaken 7`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := operate(cmd.Context(), a, admin.Suspend, req, unlocked((*node).suspend))
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
	cmd.Flags().IntVar(&req.Boots, "boots", defaultBoots, "how many boots may open it, 1 to 16")
	cmd.Flags().IntSliceVar(&req.Weaken, "weaken", nil, "the PCRs to let go (default: all but 7)")
	return cmd
}
