package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/text"
)

func newPolicyNarrow(a *app) *cobra.Command {
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "narrow",
		Short: "Remove superseded boots from the boot policy",
		Long: `Remove old boots from the boot policy that tpm.bootPolicy names: every boot that is
neither the running one nor one to which a live slot of this node's TPM is sealed.

kleidi reseal --next-… adds boots to the boot policy. After the next boot has opened
the keyring, the TPM's slots for the earlier boot are revoked. But the slots of a token,
a server or a KMS plugin are protected only by the boot policy, and would still open in
the earlier boot.

The command removes only sequences of digests. Your own text and rules without
sequences stay.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			n, err := a.node()
			if err != nil {
				return err
			}
			defer n.Close()
			r, err := reseal.NarrowPolicy(cmd.Context(), n, dryRun)
			if err != nil {
				return files.HintRoot(fmt.Errorf("narrow: %w", err))
			}
			return show(cmd, a, r, text.Narrowed)
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "show what would be removed, and change nothing")
	return cmd
}
